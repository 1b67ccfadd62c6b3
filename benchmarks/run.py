# SPDX-License-Identifier: Apache-2.0
"""What distributional values cost, side by side in one run: the loss, a critic update, and the bounds they should keep.

    python benchmarks/run.py --out benchmarks.json     # CPU: under 3 minutes on 2 cores; GPU: without change
    python benchmarks/run.py --shape medium --rounds 5 --tokens 4096      # the options of both parts

The parts, with what they measure and how: quantile_loss.py and critic_update.py, which also run by themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import critic_update
import quantile_loss
import torch


def bounds(loss: dict[str, Any], update: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured against what was asked for."""
    tables = list(loss["tables"].values())
    pairs, exact_growth, _, whole_growth, memory = tables[:5]
    updates = {row["case"]: row for row in update["rows"]}

    def row(what: str, measured: float, bound: float, *, at_least: bool = False) -> dict[str, Any]:
        kept = measured >= bound if at_least else measured <= bound
        return {"what": what, "measured": measured, "bound": f"{'>=' if at_least else '<='} {bound:g}", "kept": kept}

    rows = [
        row(f"pairwise / exact, M = {m}", min(r["pairwise/exact"] for r in pairs if r["M"] == m), least, at_least=True)
        for m, least in ((200, 50), (500, 120))
    ]
    rows += [
        row("exact loss, M 100 to 500", max(r["M 100 to 500"] for r in exact_growth), 7),
        row("dvpo_loss, M 100 to 500", max(r["M 100 to 500"] for r in whole_growth), 7),
        row("quantile_huber_loss, memory / input", max(r["quantile_huber_loss"] for r in memory), 8),
        row("dvpo_loss, memory / input", max(r["dvpo_loss"] for r in memory), 8),
    ]
    if "dvpo M=200" in updates:
        most = 1.05 if torch.cuda.is_available() else 1.10
        rows.append(row("update, dvpo M = 200 / ppo", updates["dvpo M=200"]["ratio"], most))
    if "dvpo M=50" in updates and "dvpo M=500" in updates:
        few, many = (updates[f"dvpo M={m}"]["rounds_s"] for m in (50, 500))
        ratio = statistics.median(b / a for a, b in zip(few, many, strict=True))
        rows.append(row("update, dvpo M = 500 / M = 50", ratio, 1.05))
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quantile_loss.add_arguments(parser.add_argument_group("the loss"))
    critic_update.add_arguments(parser.add_argument_group("the update"))
    if not gpu:  # so that all of it takes less than 3 minutes
        parser.set_defaults(tokens=2048, repeats=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    start = time.perf_counter()
    loss = quantile_loss.measure(options)
    quantile_loss.print_result(loss)
    update = critic_update.run(options)
    critic_update.print_table(update)
    kept = bounds(loss, update)
    quantile_loss.print_table("bounds", kept)
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s")
    if options.out:
        result = {"loss": loss, "update": update, "bounds": kept, "seconds": seconds}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
