# SPDX-License-Identifier: Apache-2.0
"""Files of what a critic believed of a few answers: ``values/step_N.safetensors`` in a run's folder.

Shape legend: L response tokens of all answers of a file laid end to end, T response tokens of one answer, N heads,
J = 11 quantile levels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from verl_dvpo.saved.files import write_bytes

#: The quantiles that are kept of each state: the median, the central 50 % and 90 %, and ends of eleven bars of a PIT.
LEVELS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.5, 0.55, 0.65, 0.75, 0.85, 0.95)

#: Of the files, inside ``trainer.default_local_dir``.
FOLDER = "values"
SUFFIX = ".safetensors"

FORMAT = "verl-dvpo values 1"

#: A dump has a few answers; a longer file is none of ours.
LONGEST = 1 << 30

#: Per-token fields with one number each; those of ``OPTIONAL`` may be absent.
NUMBERS = ("values", "rewards", "realised", "advantages", "returns")
OPTIONAL = ("advantages", "returns")

Array = NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """The beliefs of a critic along one answer. Entry t is the state from which response token t is written.

    Attributes:
        prompt: as text; empty where there was no tokenizer.
        pieces: (T,) the response's tokens as texts; empty where there was no tokenizer.
        ids: (T,) token ids of the response.
        mask: (T,) False at tokens that the policy did not write.
        quantiles: (T, J) at ``LEVELS``, in units of reward.
        heads: (T, N) the value of each head.
        values: (T,) the value that the actor saw.
        rewards: (T,) those that critic and actor learned from.
        realised: (T,) Σ γ^k r_{t+k}, what was received from there on.
        advantages: (T,) those of the actor, whitened; None where they are not known.
        returns: (T,) λ-returns; None where they are not known.
    """

    ids: Array
    mask: Array
    quantiles: Array
    heads: Array
    values: Array
    rewards: Array
    realised: Array
    advantages: Array | None = None
    returns: Array | None = None
    prompt: str = ""
    pieces: tuple[str, ...] = ()

    @property
    def reward(self) -> float:
        """The whole reward of the answer."""
        return float(self.rewards[self.mask].sum())


@dataclass(frozen=True)
class Dump:
    """Some answers of one step, as the critic saw them before it learned from them.

    Attributes:
        step: of training.
        answers: in the order of the batch.
        facts: of the run, as JSON holds them.
    """

    step: int
    answers: tuple[Answer, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def path_of(folder: Path, step: int) -> Path:
    """Returns the file of a step, inside the folder of the run's checkpoints."""
    return folder / FOLDER / f"step_{step}{SUFFIX}"


def write_dump(path: Path, dump: Dump) -> None:
    """Writes a file, whole or not at all; one that was there is replaced."""
    answers = dump.answers
    tensors: dict[str, Array] = {
        "offsets": np.cumsum([0, *(len(answer.ids) for answer in answers)], dtype=np.int64),
        "levels": np.asarray(LEVELS, dtype=np.float32),
        "ids": _joined([answer.ids for answer in answers], np.int64),
        "mask": _joined([answer.mask for answer in answers], np.uint8),
        "quantiles": _joined([answer.quantiles for answer in answers], np.float32, (0, len(LEVELS))),
        "heads": _joined([answer.heads for answer in answers], np.float32, (0, 1)),
    }
    for name in NUMBERS:
        columns = [getattr(answer, name) for answer in answers]
        if all(column is not None for column in columns):
            tensors[name] = _joined(columns, np.float32)
    texts = [{"prompt": answer.prompt, "pieces": list(answer.pieces)} for answer in answers]
    about = {"format": FORMAT, "step": str(dump.step), "facts": json.dumps(dump.facts), "texts": json.dumps(texts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, about))


def _joined(rows: Sequence[Array], kind: Any, empty: tuple[int, ...] = (0,)) -> Array:
    return np.ascontiguousarray(np.concatenate(rows) if rows else np.zeros(empty), dtype=kind)


def read_dump(path: Path) -> Dump:
    """Reads what ``write_dump`` wrote.

    Raises:
        ValueError: the file is not whole, or not of this format.
    """
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it has more than {LONGEST >> 20} MiB")
        with safe_open(path, framework="numpy") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return _dump(tensors, about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no whole file of values: {reason}; take a whole copy or remove it") from error


def _dump(tensors: Mapping[str, Array], about: Mapping[str, str]) -> Dump:
    offsets, ids = tensors["offsets"], tensors["ids"]
    texts, facts = json.loads(about["texts"]), json.loads(about["facts"])
    tokens, count = len(ids), len(offsets) - 1
    shapes = {"quantiles": (tokens, len(LEVELS)), "heads": (tokens, tensors["heads"].shape[-1]), "mask": (tokens,)}
    for name in (*shapes, *(name for name in NUMBERS if name in tensors or name not in OPTIONAL)):
        if tensors[name].shape != shapes.get(name, (tokens,)):
            raise ValueError(f"{name} has shape {tensors[name].shape}")
    if not np.allclose(tensors["levels"], LEVELS):
        raise ValueError(f"its levels are {tensors['levels'].tolist()}")
    ordered = count >= 0 and offsets[0] == 0 and offsets[-1] == tokens and bool((np.diff(offsets) >= 0).all())
    if not ordered or len(texts) != count:
        raise ValueError(f"its {count} answers do not fit its {tokens} tokens")
    answers = []
    for first, last, text in zip(offsets[:-1].tolist(), offsets[1:].tolist(), texts, strict=True):
        columns = {name: tensors[name][first:last] for name in tensors if name not in ("offsets", "levels")}
        columns["mask"] = columns["mask"] != 0
        if text["pieces"] and len(text["pieces"]) != last - first:
            raise ValueError(f"an answer of {last - first} tokens has {len(text['pieces'])} texts")
        answers.append(Answer(**columns, prompt=str(text["prompt"]), pieces=tuple(map(str, text["pieces"]))))
    return Dump(int(about["step"]), tuple(answers), dict(facts))


def dump_files(folder: Path) -> list[Path]:
    """Finds the files of a run by step, in its folder, in ``checkpoints`` or where ``values`` itself is given."""
    found: dict[int, Path] = {}
    for place in (folder, folder / FOLDER, folder / "checkpoints" / FOLDER):
        for path in place.glob(f"step_*{SUFFIX}"):
            number = path.name.removeprefix("step_").removesuffix(SUFFIX)
            if number.isdigit():
                found.setdefault(int(number), path)
    return [found[step] for step in sorted(found)]
