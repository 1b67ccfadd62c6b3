# SPDX-License-Identifier: Apache-2.0
"""What distributional values cost on this machine's GPU, in at most eight minutes and one command.

    python benchmarks/gpu.py                            # writes runs/gpu/gpu.json and gpu.md; again: goes on
    python benchmarks/gpu.py --size small               # what a CPU can do of it
    python benchmarks/gpu.py --again update -- trainer.logger=[console]     # one part anew; overrides of the run

The parts, in this order: the loss, the head, the backbone (Qwen3-0.6B's shape, random weights) with a head and its
loss; they need torch and transformers only. Then, where verl is installed, the critic worker's update, and five steps
of `main_ppo` on the demo. Each part has a process and a time limit of its own (`gpu_parts.py`), and what it found is
written when it ends, so that after an interruption or a failure the same command does what is left.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Name -> seconds that it may take at most, and a package that it needs.
PARTS: dict[str, tuple[int, str | None]] = {
    "loss": (60, None),
    "head": (60, None),
    "backbone": (120, None),
    "update": (180, "verl"),
    "run": (300, "verl"),
}
BUDGET = 480
#: A part is not begun with less than this.
LEAST = 15
TITLES = {
    "loss": "The loss, forward and backward",
    "head": "The head and its loss, all tokens at once and in blocks",
    "backbone": "Backbone, head and loss, forward and backward",
    "update": "One update of the critic's worker (FSDP2)",
    "run": "Five steps of main_ppo on the demo",
}


def ask(part: str, size: str, seconds: float, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs a part in a process of its own; what it found, or what it said last."""
    out = folder / f".{part}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part, "--size", size, "--out", str(out)]
    command += ["--folder", str(folder), *(["--", *overrides] if overrides else [])]
    started = time.monotonic()
    log = folder / f"{part}.log"
    with log.open("wb") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=file, timeout=seconds, check=False).returncode
            state = "done" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = f"took more than {seconds:.0f} s"
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - started, 1), "rows": []}
    if state == "done":
        found |= json.loads(out.read_text())
        out.unlink()
    else:
        lines = log.read_text(errors="replace").strip().splitlines()
        found["said"] = lines[-1][:300] if lines else ""
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Does the parts that are not done, and writes after each."""
    started = time.monotonic()
    file = options.out / "gpu.json"
    asked = ask("machine", "small", 60, options.out, [])
    if asked["state"] != "done":
        raise SystemExit(f"torch does not run here: {asked['said']}")
    machine = asked["machine"]
    size = options.size or ("full" if machine["gpu"] else "small")
    result: dict[str, Any] = {"machine": machine, "size": size, "parts": {}}
    if file.exists():
        before = json.loads(file.read_text())
        if (before["machine"], before["size"]) == (machine, size):
            result["parts"] = before["parts"]
    for part, (limit, package) in PARTS.items():
        if result["parts"].get(part, {}).get("state") == "done" and part not in options.again:
            print(f"{part}: done before")
            continue
        left = options.seconds - (time.monotonic() - started)
        if package and importlib.util.find_spec(package) is None:
            found: dict[str, Any] = {"state": f"{package} is not installed", "rows": []}
        elif left < LEAST:
            found = {"state": "no time left; the same command goes on here", "rows": []}
        else:
            found = ask(part, size, min(limit, left), options.out, options.overrides)
        found["date"] = datetime.date.today().isoformat()
        result["parts"][part] = found
        print(f"{part}: {found['state']}{': ' + found['said'] if found.get('said') else ''}", flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: a table for each part."""
    machine = result["machine"]
    lines = [f"# {machine['name']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in machine.items() if key not in ("name", "gpu")) + ".", ""]
    for part, found in result["parts"].items():
        lines += [f"## {TITLES[part]}", ""]
        if found["state"] != "done":
            lines += [f"Not measured on {found['date']}: {found['state']}. {found.get('said', '')}".strip(), ""]
            continue
        lines += [f"{found['note']} {found['date']}, {found['seconds']:.0f} s.", ""]
        columns = list(found["rows"][0])
        lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in found["rows"]]
        lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), help="(default: full on a GPU, small without)")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all parts together")
    parser.add_argument("--again", nargs="+", default=[], choices=PARTS, help="parts to measure anew")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the five steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    print(f"\n{markdown(result)}")
    if any(found["state"] != "done" for found in result["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
