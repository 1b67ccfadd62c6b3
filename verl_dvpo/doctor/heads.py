# SPDX-License-Identifier: Apache-2.0
"""Symptoms in a run's checkpoints: heads that are one, that do not learn, or hold no numbers.

Only the head is read, not the backbone. Shapes: D outputs, N heads of D/N outputs each, H hidden units.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from verl_dvpo.doctor import thresholds
from verl_dvpo.doctor.distribution import DIVIDE
from verl_dvpo.doctor.lines import Line, ok, problem, warning
from verl_dvpo.doctor.readings import Run, checkpoints
from verl_dvpo.export.shards import read_shards
from verl_dvpo.saved.head_file import FILE, PREFIX, read_head
from verl_dvpo.saved.manifest import Manifest, read_manifest

NAME = "heads in checkpoint"
SIGN = "in the last checkpoint heads are the same, have not moved since the one before, or hold no numbers"
#: Names of the head's tensors in a checkpoint begin with one of these.
PREFIXES = (PREFIX, "classifier.")
#: What to do about a head that has not moved.
REVIVE = (
    "draw the heads anew with critic.value.head_from=seed and critic.value.head_seed=1, and raise critic.optim.lr; see "
    "critic/grad_norm"
)
NUMBERS = "resume from an earlier checkpoint, with a lower critic.optim.lr"
REMEDY = f"the same: {DIVIDE}; not moved: {REVIVE}; no numbers: {NUMBERS}"


def judge_heads(run: Run) -> Iterator[Line]:
    """Yields what the last checkpoint says, compared with the one before; nothing where there is none.

    A checkpoint that cannot be read is a warning, because the metrics may tell enough.
    """
    folders = checkpoints(run.path)
    if not folders:
        return
    try:
        manifest, heads = _last_layer(folders[-1])
        before = _last_layer(folders[-2])[1] if len(folders) > 1 else None
    except ValueError as error:
        yield warning(NAME, str(error), "take a whole copy of the checkpoint, or look at an earlier one")
        return
    yield _judged(heads, before, f"{manifest.family}, {folders[-1].parent.name}")


def _judged(heads: Tensor, before: Tensor | None, where: str) -> Line:
    """Compares (N, D/N, H + 1) of the last checkpoint with that of the one before."""
    if not heads.isfinite().all():
        bad = [str(i) for i, head in enumerate(heads) if not head.isfinite().all()]
        return problem(NAME, f"heads {', '.join(bad)} hold no numbers ({where})", NUMBERS)
    scale = float(heads.abs().max())
    twins = [(i, j) for i in range(len(heads)) for j in range(i) if _far(heads[i], heads[j], scale) == 0]
    if twins or scale == 0:
        pairs = ", ".join(f"{j} and {i}" for i, j in twins) or "all"
        return problem(NAME, f"heads {pairs} are the same ({where})", DIVIDE)
    if before is not None and before.shape == heads.shape:
        moved = [_far(new, old, scale) for new, old in zip(heads, before, strict=True)]
        still = [str(i) for i, distance in enumerate(moved) if distance == 0]
        if still:
            text = f"of {len(heads)} heads these have not moved since the checkpoint before: {', '.join(still)}"
            return problem(NAME, f"{text} ({where})", REVIVE)
    count = "one head" if len(heads) == 1 else f"{len(heads)} heads, all different"
    return ok(NAME, f"{count}{' and moving' if before is not None else ''} ({where})")


def _far(one: Tensor, other: Tensor, scale: float) -> float:
    """The largest difference of two heads over ``scale``; 0 where it is rounding."""
    distance = float((one - other).abs().max()) / max(scale, torch.finfo(torch.float32).tiny)
    return distance if distance > thresholds.SAME_WEIGHTS else 0.0


def _last_layer(folder: Path) -> tuple[Manifest, Tensor]:
    """Reads a critic's last layer, bias and all: (N, D/N, H + 1).

    Raises:
        ValueError: the folder is not whole, or has no head.
    """
    exported = (folder / FILE).is_file()
    manifest = read_manifest(folder, "critic" if exported else "checkpoint")
    inner = next((place for place in (folder, folder / "huggingface") if (place / FILE).is_file()), None)
    saved = read_head(inner) if inner is not None else read_shards(folder, PREFIXES)
    found = {name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1]): tensor for name, tensor in saved.items()}
    prefix = "out." if "out.weight" in found else ""
    if f"{prefix}weight" not in found:
        raise ValueError(f"{folder} has no head of a critic; take a whole copy of the checkpoint")
    weight = found[f"{prefix}weight"].float()
    bias = found[f"{prefix}bias"].float() if f"{prefix}bias" in found else weight.new_zeros(weight.shape[0])
    rows = torch.cat([weight, bias[:, None]], dim=1)
    heads = manifest.settings.get("num_heads")
    count = heads if isinstance(heads, int) and heads > 0 and rows.shape[0] % heads == 0 else 1
    return manifest, rows.unflatten(0, (count, rows.shape[0] // count))
