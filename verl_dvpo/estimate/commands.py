# SPDX-License-Identifier: Apache-2.0
"""The command ``verl-dvpo estimate``. Its docstring is its help; what it uses is imported when it runs."""

from typing import Annotated

import typer


def estimate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As for main_ppo: algorithm=ppo ...")] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A GPU by its name; again for more. (default: all known)", show_default=False),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="How many train. (default: the recipe's)", show_default=False)
    ] = None,
    response: Annotated[
        float | None,
        typer.Option(help="Mean tokens of an answer. (default: half of the longest allowed)", show_default=False),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the bf16 peak that training reaches.")] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations, seconds.")] = False,
) -> None:
    """Estimate memory for each GPU, operations and time of a step of a recipe.

    Actor, critic, reference and rollout, from the recipe and the model's config.json alone; no GPU and no weights.

    Exit status: 0, also where the run does not fit; 2 for input that cannot be used.

    Example: `verl-dvpo estimate qwen3_8b_math --gpu H100 --gpus 8 algorithm=dvpo`
    """
    from verl_dvpo.estimate.gpus import GPUS, find_gpu
    from verl_dvpo.estimate.result import result
    from verl_dvpo.estimate.settings import compose_recipe, read_settings, with_gpus

    chosen = {name: find_gpu(name) for name in (gpu or GPUS)}
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is {utilisation!r}; a share in (0, 1] is allowed; 0.4 is usual")
    settings = read_settings(compose_recipe(recipe, with_gpus(overrides or [], gpus)), recipe)
    mean = settings.response / 2 if response is None else response
    if not 0 < mean <= settings.response:
        raise ValueError(
            f"--response is {mean!r}; above 0 and at most data.max_response_length, {settings.response}, is allowed; "
            "change one of the two"
        )
    found = result(settings, chosen, mean, utilisation)
    if json:
        import json as encoder

        print(encoder.dumps(found, indent=2))
        return
    from verl_dvpo.estimate.report import show

    print(show(found))
