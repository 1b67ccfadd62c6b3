# SPDX-License-Identifier: Apache-2.0
"""The numbers that a critic's rank keeps between inference and update. They never leave the process.

Shape legend: B sequences of this rank, T response positions, L all response tokens of this rank laid end to end,
S numbers kept per token.
"""

import hashlib
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl_dvpo.families.base import Reduce, ValueFamily

if TYPE_CHECKING:
    from tensordict import TensorDict


class KeptSamples:
    """The samples of one inference pass, with the sequences they belong to.

    Args:
        kept: jagged (B, T, S).
        data: the batch that was inferred, with jagged ``prompts`` (B, P) and ``responses`` (B, T).
        statistics: sums over valid tokens, as ``masked_sums`` gives them.
    """

    def __init__(self, kept: Tensor, data: "TensorDict", statistics: dict[str, Tensor]) -> None:
        self.values = kept.values()
        self.offsets: Tensor = data["responses"].offsets()
        self.sequences = [data[name] for name in ("prompts", "responses")]
        self.statistics = statistics

    def of(self, data: "TensorDict") -> "KeptSamples | None":
        """Returns the samples of the sequences in ``data``, in its order; None where one was not inferred.

        A sequence is known by its tokens: equal sequences have equal samples.
        """
        wanted = [data[name] for name in ("prompts", "responses")]
        if all(_same(own, other) for own, other in zip(self.sequences, wanted, strict=True)):
            return self
        rows = {key: row for row, key in enumerate(sequence_keys(*self.sequences))}
        found = [rows.get(key) for key in sequence_keys(*wanted)]
        if None in found:
            return None
        bounds = self.offsets.tolist()
        pieces = [self.values[bounds[row] : bounds[row + 1]] for row in found if row is not None]
        kept = torch.nested.nested_tensor_from_jagged(
            torch.cat(pieces), data["responses"].offsets().to(self.values.device)
        )
        return KeptSamples(kept, data, self.statistics)


def _same(one: Tensor, other: Tensor) -> bool:
    """Tells whether two jagged tensors are equal."""
    return torch.equal(one.offsets(), other.offsets()) and torch.equal(one.values(), other.values())  # type: ignore[attr-defined]


def sequence_keys(prompts: Tensor, responses: Tensor) -> list[tuple[int, int]]:
    """Computes a key of each sequence, (B,), from its tokens alone."""
    return list(zip(prompt_keys(prompts).tolist(), prompt_keys(responses).tolist(), strict=True))


class Targets:
    """The targets of one update: name -> (L, ...), looked up by row of this rank's batch.

    Args:
        tensors: name -> (L, ...).
        offsets: (B + 1,) where each row begins.
        multipliers: of the constraints; empty where the family has none.
        statistics: sums over valid tokens, as ``masked_sums`` gives them.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        offsets: Tensor,
        multipliers: dict[str, Tensor],
        statistics: dict[str, Tensor],
    ) -> None:
        self.tensors = tensors
        self.offsets = offsets
        self.multipliers = multipliers
        self.statistics = statistics

    def of(self, batch_rows: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Looks up the tokens of a micro-batch: name -> (L', ...).

        Args:
            batch_rows: (B',) row in this rank's batch of each sequence of the micro-batch.
            rows: (L',) sequence of each token within the micro-batch.
            columns: (L',) its position within the response.
        """
        home = self.offsets.device
        index = self.offsets[batch_rows.to(home)][rows.to(home)] + columns.to(home)
        return {name: tensor[index].to(columns.device) for name, tensor in self.tensors.items()}


def build_targets(
    family: ValueFamily,
    kept: KeptSamples,
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    rows_per_chunk: int,
    generator: torch.Generator | None = None,
    reduce: Reduce | None = None,
    prompts: Tensor | None = None,
) -> Targets:
    """Builds the targets of one update, a few rows at a time, and their multipliers and statistics.

    Args:
        family: the critic's family.
        kept: what inference kept.
        rewards: jagged (B, T), any device.
        mask: jagged (B, T), 0 at tokens that the policy did not write.
        gamma: discount in [0, 1].
        lam: trace in [0, 1].
        rows_per_chunk: sequences built at once, >= 1.
        generator: for targets that are drawn.
        reduce: adds a 1-D tensor over data-parallel ranks; None for one rank.
        prompts: (B,) from ``prompt_keys``, for a family that sees prompts.
    """
    device = kept.values.device
    offsets = kept.offsets.to(device)
    bounds = kept.offsets.tolist()
    rewards_flat = rewards.values().to(device=device, dtype=torch.float32)
    mask_flat = mask.values().to(device)
    chunks: list[dict[str, Tensor]] = []
    for first in range(0, len(bounds) - 1, rows_per_chunk):
        last = min(first + rows_per_chunk, len(bounds) - 1)
        piece = slice(bounds[first], bounds[last])
        chunk_offsets = offsets[first : last + 1] - bounds[first]
        inside = _inside(chunk_offsets)
        padded = [_pad(flat[piece], inside) for flat in (kept.values, rewards_flat, mask_flat)]
        more: dict[str, Any] = {} if prompts is None else {"prompts": prompts[first:last]}
        built = family.build_targets(*padded, gamma=gamma, lam=lam, generator=generator, **more)
        chunks.append({name: tensor[inside] for name, tensor in built.items()})
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    multipliers = family.multipliers(tensors, mask_flat, reduce=reduce)
    return Targets(tensors, offsets, multipliers, masked_sums(family.target_statistics(tensors), mask_flat))


def prompt_keys(prompts: Tensor) -> Tensor:
    """Computes a key of each prompt from its tokens alone.

    Args:
        prompts: jagged (B, P) token ids.

    Returns:
        (B,) int64 in [0, 2^63), on the CPU; equal for equal prompts, on every rank and in every run.
    """
    tokens = prompts.values().to("cpu", torch.int64).numpy()
    bounds = prompts.offsets().tolist()  # type: ignore[attr-defined]
    digests = [
        hashlib.blake2b(tokens[first:last].tobytes(), digest_size=8).digest()
        for first, last in itertools.pairwise(bounds)
    ]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def _inside(offsets: Tensor) -> Tensor:
    """(B + 1,) -> (B, T) bool: true where a row has a token."""
    lengths = offsets.diff()
    return torch.arange(int(lengths.max()), device=offsets.device) < lengths.unsqueeze(1)


def _pad(flat: Tensor, inside: Tensor) -> Tensor:
    """(L, ...) -> (B, T, ...), zeros outside."""
    out = flat.new_zeros(*inside.shape, *flat.shape[1:])
    out[inside] = flat
    return out


def masked_sums(statistics: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Sums each (L,) over valid tokens, and adds their number as ``tokens``; empty where there is no statistic."""
    if not statistics:
        return {}
    valid = mask.to(torch.float32)
    return {name: (value * valid).sum() for name, value in statistics.items()} | {"tokens": valid.sum()}


def mean_statistics(sums: Mapping[str, Tensor], reduce: Reduce | None = None) -> dict[str, float]:
    """Divides sums of ``masked_sums`` by their tokens, over all ranks; empty for empty sums."""
    if not sums:
        return {}
    names = [name for name in sums if name != "tokens"]
    total = torch.stack([sums[name].double() for name in (*names, "tokens")])
    if reduce is not None:
        total = reduce(total)
    means = total[:-1] / total[-1].clamp_min(1)
    return dict(zip(names, means.tolist(), strict=True))


def reward_std(rewards: Tensor, mask: Tensor, reduce: Reduce | None = None) -> float:
    """Computes the standard deviation of total rewards over all ranks; rows without a valid token do not count.

    Args:
        rewards: jagged (B, T).
        mask: jagged (B, T).
        reduce: adds a 1-D tensor over ranks; None for one rank.
    """
    totals = rewards.to_padded_tensor(0.0).double().sum(-1)
    counts = (mask.to_padded_tensor(0) != 0).any(-1).double()
    sums = torch.stack([(totals * counts).sum(), counts.sum()])
    sums = reduce(sums) if reduce is not None else sums
    mean = sums[0] / sums[1].clamp_min(1)
    # Twice over the data, centred: squares lose nothing where rewards are large and close.
    squares = ((totals - mean).square() * counts).sum().reshape(1)
    squares = reduce(squares) if reduce is not None else squares
    return float((squares[0] / sums[1].clamp_min(1)).sqrt())
