# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that learn in several ways, one after the other; run by test_ranks.py in a process of its own."""

import sys
from pathlib import Path
from typing import Any

import torch

import verl_dvpo
from critic import attention, harness
from verl_dvpo.families.registry import family_names

#: Of the families' own defaults.
SIZES = {"num_heads": None, "num_quantiles": None}
QUANTILES = {"family": "quantile_ensemble", "num_heads": 2, "num_quantiles": 5, "share_every": 1}
TWO_PARTS = {"engine": {"ulysses_sequence_parallel_size": 2}, "attention": attention.NAME}

#: What each pair of ranks is made of, as `harness.make_worker` takes it; each of a pair gets four of eight sequences.
CASES: dict[str, dict[str, Any]] = {
    name: {"value": {**SIZES, "family": name}} for name in family_names() if not name.startswith("test_")
}
CASES |= {
    "quantile_ensemble": {"value": QUANTILES},
    "padded": {"value": QUANTILES, "use_remove_padding": False},
    "replicas of a shard": {"value": QUANTILES, "engine": {"fsdp_size": 1}},
    "parts of a sequence": {"value": QUANTILES, **TWO_PARTS},
    "parts of a sequence in blocks": {"value": {**QUANTILES, "tokens_per_block": 3}, **TWO_PARTS},
}


def rows_of(case: dict[str, Any], rank: int) -> slice:
    """The sequences of a rank; those that share sequences have all."""
    return slice(None) if "attention" in case else slice(4 * rank, 4 * rank + 4)


def main(model: str, port: str, rank: str, out: str) -> None:
    attention.register()
    seen: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        settings = {**case, "value": {**case["value"], "rows_per_chunk": 4}}
        worker = harness.make_worker(model, rank=int(rank), world_size=2, port=int(port), **settings)
        gradients = harness.capture_gradients(worker)
        batch = harness.make_batch(rows=rows_of(case, int(rank)))
        inferred, updated = harness.infer(worker, batch), harness.update(worker, batch)
        seen[name] = {"gradients": gradients}
        if inferred is not None:  # one of those that share sequences answers for all
            seen[name] |= {"values": inferred["values"].values(), "metrics": harness.tu.get(updated, "metrics")}
    torch.save({"cases": seen, "package": str(Path(verl_dvpo.__file__).parent)}, f"{out}-{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
