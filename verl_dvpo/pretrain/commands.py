# SPDX-License-Identifier: Apache-2.0
"""The command ``verl-dvpo pretrain-critic``. Its docstring is its help; what it uses is imported when it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def pretrain_critic(
    model: Annotated[str, typer.Option(help="The critic's model: a folder, or a hub's name.")],
    rollouts: Annotated[list[Path], typer.Option(help="Parquet, JSON lines, or a folder of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    family: Annotated[str, typer.Option(help="The value family.")] = "quantile_ensemble",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the family, as num_heads=3.")] = None,
    epochs: Annotated[int, typer.Option(help="At most.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Sequences of one update.")] = 32,
    lr: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    gamma: Annotated[float, typer.Option(help="Discount in [0, 1].")] = 1.0,
    lam: Annotated[float, typer.Option(help="Trace in [0, 1] of the targets; 1 takes rewards alone.")] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that is held out, in (0, 1).")] = 0.1,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better held-out score before it stops; 0 keeps the last of all.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute. (default: an accelerator, else cpu)")] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Fit a critic of any family to saved rollouts, for `critic.model.path` and `ValueModel`.

    Rollouts are parquet files with prompt, response and reward, or what verl dumps with `trainer.rollout_data_dir`.

    Example: `verl-dvpo pretrain-critic --model runs/demo/data/model --rollouts runs/demo/dump --out critics/start`
    """
    import torch

    from verl_dvpo.export.value_model import ValueModel
    from verl_dvpo.families.registry import family_settings
    from verl_dvpo.pretrain.fit import FitConfig, fit
    from verl_dvpo.pretrain.report import write_report
    from verl_dvpo.pretrain.rollouts import read_rollouts, split_by_prompt
    from verl_dvpo.saved.facts import base_name
    from verl_dvpo.saved.files import refuse_taken

    refuse_taken(out)
    settings = family_settings(family, **parse_settings(set_ or []))
    config = FitConfig(epochs=epochs, batch_size=batch_size, lr=lr, gamma=gamma, lam=lam, patience=patience, seed=seed)
    try:
        critic = ValueModel.build(model, settings, trust_remote_code=trust_remote_code)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model is {model!r}; a folder, or a name on a hub that can be reached, is allowed: {reason}"
        ) from error
    found = read_rollouts(rollouts, critic.tokenizer)
    train, judge = split_by_prompt(found, held_out, seed)
    critic.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = {"sequences": len(train), "sequences_held_out": len(judge)}
    say(f"{len(train)} rollouts to learn from, {len(judge)} held out")
    fitted = fit(critic, train, judge, config, progress=say)
    best = fitted.history[fitted.best]
    critic.to("cpu").save_pretrained(
        out,
        tokenizer=model if Path(model).is_dir() else None,
        facts={
            "base_model": base_name(model),
            "algorithm": {"pretraining": f"{len(train)} rollouts", "gamma": gamma, "lam": lam},
            "seeds": {"pretraining": seed, "head_seed": settings.head_seed},
        },
        metrics={"held-out CRPS": best.crps, "held-out explained variance": best.explained_variance},
        extra=lambda folder: write_report(folder, fitted, config, about),
    )
    print(
        f"wrote {out}; start an algorithm of the family {family} from it with\n  {' '.join(overrides(out, settings))}"
    )


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Turns ``name=value`` into settings; a dot makes a section, and a value is JSON or text.

    Raises:
        ValueError: a text has no ``=``.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set is {text!r}; name=value is allowed, such as num_heads=3")
        *sections, last = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return found


def overrides(out: Path, settings: Any) -> list[str]:
    """Returns the overrides of a run that starts from the critic in ``out``."""
    layout = {name: "null" if value is None else value for name, value in settings.layout().items()}
    return [f"critic.model.path={out}", *(f"critic.value.{name}={value}" for name, value in layout.items())]


def say(line: str) -> None:
    """Writes a line of progress."""
    print(line, file=sys.stderr, flush=True)
