# SPDX-License-Identifier: Apache-2.0
"""Prints for runs of weights.yaml the first step in which weights leave out a tenth of the tokens, and the score.

python examples/studies/weights_act.py runs/studies/weights
"""

import json
import sys
from pathlib import Path

from scipy import stats

from verl_dvpo.records import read_metrics

SHARE = "advantages/effective_share"
for name in ("dvpo_weighted", "ppo_gaussian_weighted"):
    found = []
    for folder in sorted(Path(sys.argv[1]).glob(f"runs/{name}__heavy_prompt__one_answer__s*")):
        if not (folder / "run.json").is_file():
            continue
        record = json.loads((folder / "run.json").read_text())
        shares = [
            (row["step"], row["data"][SHARE])
            for row in read_metrics(folder / "metrics.jsonl")
            if record["status"] == "finished" and SHARE in row["data"]
        ]
        if not shares:
            continue
        found.append((next((step for step, share in shares if share < 0.9), shares[-1][0] + 1), record["score"]))
        print(f"{folder.name}: step {found[-1][0]}, score {found[-1][1]:.3f}")
    rank = stats.spearmanr(*zip(*found, strict=True))
    print(f"{name}: {len(found)} runs, rank correlation {rank.statistic:.2f}, p {rank.pvalue:.3f}")
