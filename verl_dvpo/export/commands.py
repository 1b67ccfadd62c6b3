# SPDX-License-Identifier: Apache-2.0
"""The command ``verl-dvpo export``. Its docstring is its help; what it uses is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of its checkpoints, or of one step.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint. (default: the last)")] = None,
    adapter: Annotated[str, typer.Option(help="LoRA's adapters: merge (into the weights) or keep.")] = "merge",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Write a run's critic as a Hugging Face folder, which loads without verl.

    `verl_dvpo.ValueModel.from_pretrained(DIR)` gives distributions of texts; `critic.model.path=DIR` goes on with it.

    Example: `verl-dvpo export runs/demo/dvpo --out critics/demo`
    """
    from verl_dvpo.export.run import export as write
    from verl_dvpo.saved.files import refuse_taken

    refuse_taken(out)
    source = write(run, out, step=step, adapter=adapter, trust_remote_code=trust_remote_code)
    print(f"wrote {out} from {source}")
