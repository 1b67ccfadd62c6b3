# SPDX-License-Identifier: Apache-2.0
"""The demo's reward, until the file that ``FAULT`` names is there: then it hangs, raises or returns a NaN."""

import json
import os
import time
from pathlib import Path
from typing import Any

from verl_dvpo.bench.tasks.reward import compute_score as clean

FAULT: Any = json.loads(os.environ.get("FAULT", "{}"))


def compute_score(*args: Any, **kwargs: Any) -> Any:
    if isinstance(FAULT, dict) and FAULT.get("reward") and Path(FAULT["what"]).exists():
        if FAULT["reward"] == "hangs":
            time.sleep(10_000)
        if FAULT["reward"] == "raises":
            raise RuntimeError("the reward server does not answer")
        return float("nan")
    return clean(*args, **kwargs)
