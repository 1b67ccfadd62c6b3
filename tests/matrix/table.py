# SPDX-License-Identifier: Apache-2.0
"""The table of docs/support.md: tries every cell and draws what was found.

    python tests/matrix/table.py                         # cells without a result, then the table
    python tests/matrix/table.py --again megatron fsdp2  # cells whose names begin so, anew
    python tests/matrix/table.py --draw                  # the table alone

A cell is one update of the critic's worker on eight ragged sequences, against plain torch (`reference.py`). Results are
kept in docs/support.json as they come, so an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("VERL_PLATFORM", "cpu")

from matrix.cells import CELLS, LAYOUTS, NOTES, Cell  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md"
BEGIN, END = "<!-- cells: begin, made by tests/matrix/table.py -->", "<!-- cells: end -->"
#: Seconds that one start of processes may take, with all its cells.
LIMIT = 900
Results = dict[str, dict[str, Any]]


def prepare(folder: Path) -> None:
    """Writes the backbone and the adapter that all cells share."""
    from matrix import reference

    reference.save_adapter(reference.save_model(folder / "model"), folder / "adapter")


def expected(folder: Path) -> dict[bool, dict[str, Any]]:
    """With an adapter or not -> what a cell has to find."""
    from critic import plain

    from matrix import reference
    from verl_dvpo.critic.config import family_config
    from verl_dvpo.critic.head import build_head
    from verl_dvpo.families.registry import build_family

    head = build_head(16, build_family(family_config(**plain.VALUE)), seed=family_config(**plain.VALUE).head_seed)
    weights = {name: parameter.detach().double() for name, parameter in head.named_parameters()}
    model, adapter = str(folder / "model"), str(folder / "adapter")
    return {lora: reference.reference(model, weights, adapter if lora else None) for lora in (False, True)}


def run_ranks(cells: list[Cell], folder: Path, ranks: int) -> None:
    """Starts the processes of one number of ranks; each does all cells."""
    from critic import harness

    port = str(harness.free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"}
    environment["PYTHONPATH"] = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    script = str(Path(__file__).with_name("ranks.py"))
    processes = []
    for rank in range(ranks):
        command = [sys.executable, script, str(folder), str(rank), str(ranks), port, *(cell.name for cell in cells)]
        with (folder / f"{ranks}-{cells[0].layout}.{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for process in processes:
        try:
            process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()


def read(cell: Cell, folder: Path) -> dict[str, Any]:
    """What the ranks of a cell found, put together: values of all shares, gradients of the last rank, or an error."""
    import torch

    layout = LAYOUTS[cell.layout]
    files = [folder / f"{cell.name.replace(' ', '-')}.{rank}.pt" for rank in range(layout.ranks)]
    if not all(file.exists() for file in files):
        return {"error": "a process ended before its time"}
    seen = [torch.load(file, weights_only=False) for file in files]
    for each in seen:
        if "error" in each:
            return each
    shares = {each["share"]: each["values"] for each in reversed(seen) if each["values"] is not None}
    values = [value for share in sorted(shares) for value in shares[share]]
    return {"values": values, "gradients": seen[-1]["gradients"]}


def judge(cell: Cell, seen: dict[str, Any], wanted: dict[bool, dict[str, Any]]) -> dict[str, Any]:
    """The entry of a cell that was tried."""
    from matrix import reference

    if "error" in seen:
        return {"verdict": "failed", "said": seen["error"][:200]}
    distance = reference.distance(seen, wanted[cell.lora])
    verdict = "passed" if distance <= reference.TOLERANCE else "failed"
    return {"verdict": verdict, "distance": float(f"{distance:.1e}")}


def refusal(cell: Cell) -> None:
    """Checks that a cell with an excuse cannot be run by mistake.

    Raises:
        AssertionError: it could be.
    """
    from verl_dvpo.critic.config import ValueModelConfig, family_config

    layout = LAYOUTS[cell.layout]
    if cell.excuse == "no_fsdp1":
        from verl.workers.engine.base import EngineRegistry

        import verl_dvpo.critic.fsdp  # noqa: F401
        from verl_dvpo.critic.engine import MODEL_TYPE

        assert "cpu" not in EngineRegistry._engines[MODEL_TYPE]["fsdp"]
    if cell.excuse == "no_adapters":
        from critic import plain
        from verl.workers.config import McoreEngineConfig

        from verl_dvpo.critic.megatron_config import DistributionalMegatronCriticConfig

        with tempfile.TemporaryDirectory() as folder:
            from matrix import reference

            model = ValueModelConfig(path=reference.save_model(Path(folder)), load_tokenizer=False, lora_rank=2)
            try:
                DistributionalMegatronCriticConfig(
                    megatron=McoreEngineConfig(vanilla_mbridge=True, **layout.settings),
                    model=model,
                    value=family_config(**plain.VALUE),
                    ppo_micro_batch_size_per_gpu=2,
                )
            except ValueError as error:
                assert "critic.model.lora_rank" in str(error)  # noqa: PT017
                return
        raise AssertionError("LoRA is no longer refused; take the excuse out")


def stamp() -> dict[str, str]:
    """Date and commit of an entry."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {"date": datetime.date.today().isoformat(), "commit": done.stdout.strip()}


def fill(results: Results, cells: list[Cell]) -> None:
    """Tries cells, and keeps what was found after each start of processes."""
    mark, checked = stamp(), set()
    for cell in cells:
        if cell.excuse is not None:
            if (cell.excuse, cell.layout) not in checked:
                refusal(cell)
                checked.add((cell.excuse, cell.layout))
            results[cell.name] = {"verdict": cell.verdict, "note": cell.excuse, **mark}
    write(results)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        wanted = expected(folder)
        for engine, ranks in (("fsdp2", 1), ("fsdp2", 2), ("megatron", 1), ("megatron", 2)):
            group = [
                cell
                for cell in cells
                if cell.excuse is None and (LAYOUTS[cell.layout].engine, LAYOUTS[cell.layout].ranks) == (engine, ranks)
            ]
            if not group:
                continue
            run_ranks(group, folder, ranks)
            for cell in group:
                results[cell.name] = judge(cell, read(cell, folder), wanted) | mark
                print(cell.name, results[cell.name], flush=True)
            write(results)


def load() -> Results:
    """What was found so far: name of a cell -> its entry."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(results: Results) -> None:
    RESULTS.write_text(json.dumps({name: results[name] for name in CELLS if name in results}, indent=1) + "\n")


def drawn(results: Results) -> str:
    """The table in Markdown; a cell without a result is ``not tried``."""
    head = [
        f"{'LoRA' if lora else 'all weights'}, {'dynamic' if dynamic else 'fixed'}{', checkpointing' if again else ''}"
        for lora in (False, True)
        for dynamic in (False, True)
        for again in (False, True)
    ]
    notes = {name: number for number, name in enumerate(NOTES, 1)}
    lines = ["| engine | batch | " + " | ".join(head) + " |", "| " + " | ".join(["---"] * (len(head) + 2)) + " |"]
    for layout in LAYOUTS.values():
        for packed in (True, False):
            row = [layout.title, "packed" if packed else "padded"]
            for lora in (False, True):
                for dynamic in (False, True):
                    for again in (False, True):
                        found = results.get(Cell(layout.name, packed, lora, dynamic, again).name)
                        row.append("not tried" if found is None else text(found, notes))
            lines.append("| " + " | ".join(row) + " |")
    passed = [each["distance"] for each in results.values() if each["verdict"] == "passed"]
    worst = f" The largest difference of a cell that passed is {max(passed):.1e}." if passed else ""
    commits = sorted({each["commit"] for each in results.values()})
    named = f" Commits: {', '.join(commits)}." if commits else ""
    lines += ["", f"{len(passed)} of {len(CELLS)} cells passed.{worst}{named}", ""]
    lines += [f"- [{number}] {NOTES[name]}" for name, number in notes.items()]
    lines += [
        f"- {name}: {each.get('said', each.get('distance'))}"
        for name, each in results.items()
        if each["verdict"] == "failed"
    ]
    return "\n".join(lines)


def text(found: dict[str, Any], notes: dict[str, int]) -> str:
    note = f" [{notes[found['note']]}]" if "note" in found else ""
    return f"{found['verdict']}{note} {found['date']}"


def draw(results: Results) -> None:
    """Puts the table between its marks in docs/support.md."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{drawn(results)}\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", help="beginnings of names; all cells where none is given")
    parser.add_argument("--draw", action="store_true", help="try nothing")
    options = parser.parse_args()
    results = load()
    if not options.draw:
        again = None if options.again is None else tuple(options.again or [""])
        cells = [c for c in CELLS.values() if c.name not in results or (again and c.name.startswith(again))]
        fill(results, cells)
    draw(results)
    if any(found["verdict"] == "failed" for found in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
