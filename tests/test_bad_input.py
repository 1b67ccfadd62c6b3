# SPDX-License-Identifier: Apache-2.0
"""Every command says in one line what is wrong with what it was given, and ends with status 2.

The commands come from ``pyproject.toml``, so that one that was added has to be given its cases here.
"""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from verl_dvpo.cli import GROUP, QUIET, main, one_line

ROOT = Path(__file__).parents[1]
STUDY = "name: s\nout: {out}\nsteps: 1\nseeds: [0]\nalgorithms: [ppo]\nnoises: [none]\ntasks: [demo]\n"


def declared() -> dict[str, str]:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


@pytest.fixture(autouse=True)
def _commands_of_this_checkout(tmp_path_factory, monkeypatch):
    """Puts the checkout's own entry points in front of those that were installed at some time."""
    place = tmp_path_factory.mktemp("dist")
    info = place / "verl_dvpo-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl-dvpo\nVersion: 0\n")
    lines = [f"{name} = {target.partition(' [')[0]}" for name, target in declared().items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(place)
    for name in QUIET:
        monkeypatch.setenv(name, "1")


def run_folder(folder: Path) -> Path:
    """A run that has begun: its first line is being written."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "da')
    return folder


def other_version(folder: Path) -> Path:
    """A checkpoint whose manifest is of a format to come."""
    critic = folder / "global_step_4" / "critic"
    critic.mkdir(parents=True)
    (critic / "manifest.json").write_text(
        json.dumps({"format": 99, "facts": {"versions": {"verl-dvpo": "9.9"}}}, indent=2) + "\n"
    )
    return folder


def study_file(folder: Path, text: str) -> Path:
    folder.mkdir()
    path = folder / "study.yaml"
    path.write_text(text.format(out=folder / "out"))
    return path


def a_file(path: Path) -> Path:
    path.write_text("text")
    return path


def folder_with(path: Path, name: str, text: str = "x") -> Path:
    path.mkdir()
    (path / name).write_text(text)
    return path


#: Command -> name of the case -> arguments of a scratch folder, and what the line says.
CASES = {
    "demo-data": {
        "out is a file": (lambda at: ["--out", a_file(at / "f"), "--tiny"], "f"),
        "seed": (lambda at: ["--out", at / "d", "--tiny", "--seed", "-1"], "seed is -1"),
        "out is taken": (lambda at: ["--out", folder_with(at / "d", "mine"), "--tiny"], "d"),
    },
    "demo": {"data is a file": (lambda at: ["--data", a_file(at / "f"), "--out", at / "o"], "f")},
    "domains": {"out is a file": (lambda at: ["--out", a_file(at / "f"), "--tiny"], "f")},
    "exam-data": {"out is a file": (lambda at: ["--out", a_file(at / "f"), "--tiny"], "f")},
    "gate": {
        "unknown task": (lambda at: ["--out", at / "o", f"other={at}"], "TASK=FOLDER is allowed"),
        "unknown folder": (lambda at: ["--out", at / "o", f"exam={at / 'no'}"], "folder of task exam is"),
        "unknown study": (lambda at: ["--out", at / "o", "--study", at / "no"], "the folder of a study"),
        "nothing": (lambda at: ["--out", at / "o"], "tasks is empty"),
    },
    "run": {
        "unknown algorithm": (lambda at: ["--", "algorithm=no_such"], "no_such"),
        "unknown field": (lambda at: ["--", "critic.value.speed=1"], "speed"),
        "no value": (lambda at: ["--", "algorithm=dvpo", "critic.value.kappa"], "kappa"),
        "unknown configuration": (lambda at: ["--config-name", "no_trainer", "--", "algorithm=dvpo"], "no_trainer"),
    },
    "study": {
        "no file": (lambda at: ["run", at / "no.yaml"], "no.yaml"),
        "a folder": (lambda at: ["run", at], str),
        "unknown field": (lambda at: ["run", study_file(at / "s", STUDY + "speed: 1\n")], "speed"),
        "no YAML": (lambda at: ["run", study_file(at / "s", "a: [")], "study.yaml"),
        "no study": (lambda at: ["status", at / "no"], "the folder of a study has a study.json"),
        "broken": (lambda at: ["status", folder_with(at / "s", "study.json", '{"a": ')], "study.json"),
        "no study to report": (lambda at: ["report", at / "no"], "the folder of a study has a study.json"),
        "broken report": (lambda at: ["report", folder_with(at / "s", "study.json", '{"a": ')], "study.json"),
        "no study to collect": (lambda at: ["collect", at / "no", "--out", at / "o"], "has a study.json"),
    },
    "sweep": {
        "no sweep": (lambda at: ["report", at / "no"], "hydra.sweep.dir"),
        "a run": (lambda at: ["report", run_folder(at / "r")], "hydra.sweep.dir"),
    },
    "lab": {
        "nothing to draw": (lambda at: ["--out", at / "no", "--redraw"], "need its lab.json"),
        "broken": (lambda at: ["--out", folder_with(at / "l", "lab.json", '{"a": '), "--redraw"], "lab.json"),
        "of another version": (lambda at: ["--out", folder_with(at / "l", "lab.json", "{}"), "--redraw"], "lab.json"),
        "unknown experiment": (lambda at: ["--out", at / "o", "--only", "nothing"], "nothing"),
        "out is a file": (lambda at: ["--out", a_file(at / "f"), "--quick"], "f"),
    },
    "export": {
        "no run": (lambda at: [at / "no", "--out", at / "o"], "a folder with checkpoints"),
        "still going": (lambda at: [run_folder(at / "r"), "--out", at / "o"], "a folder with checkpoints"),
        "other version": (lambda at: [other_version(at / "r"), "--out", at / "o"], "the version that wrote it, 9.9"),
        "no such step": (lambda at: [other_version(at / "r"), "--out", at / "o", "--step", "5"], "step is 5"),
        "out is taken": (lambda at: [at / "r", "--out", folder_with(at / "o", "mine")], "out is"),
    },
    "plot": {
        "no run": (lambda at: [at / "no", "--out", at / "o"], "there is no such folder"),
        "still going": (lambda at: [run_folder(at / "r"), "--out", at / "o"], "r"),
        "other version": (
            lambda at: [other_version(at / "r"), "--out", at / "o", "--rollouts", a_file(at / "a.jsonl")],
            "the version that wrote it, 9.9",
        ),
        "out is taken": (lambda at: [run_folder(at / "r"), "--out", folder_with(at / "o", "mine")], "out is"),
        "answers": (lambda at: [run_folder(at / "r"), "--out", at / "o", "--answers", "0"], "answers is 0"),
    },
    "pretrain-critic": {
        "no model": (lambda at: pretraining(at, model=at / "no"), "no"),
        "no rollouts": (lambda at: pretraining(at, rollouts=at / "no.jsonl"), "no.jsonl"),
        "missing column": (lambda at: pretraining(at, row={"prompt": "1+1", "reward": 1.0}), "response"),
        "family": (lambda at: [*pretraining(at), "--family", "nothing"], "nothing"),
        "setting": (lambda at: [*pretraining(at), "--set", "num_heads"], "name=value"),
    },
    "estimate": {
        "unknown recipe": (lambda at: ["nothing"], "nothing"),
        "unknown GPU": (lambda at: ["qwen3_8b_math", "--gpu", "abacus"], "abacus"),
    },
    "data": {
        "unknown set": (lambda at: ["nothing", "--out", at / "o"], "nothing"),
        "no file": (lambda at: ["math500", "--source", at / "no.parquet", "--out", at / "o"], "no.parquet"),
        "missing column": (lambda at: ["math500", "--source", a_row(at / "m.jsonl"), "--out", at / "o"], "problem"),
    },
    "pseudo-labels": {
        "no data": (
            lambda at: ["--data", at / "no.parquet", "--samples", a_row(at / "s.jsonl"), "--out", at / "o"],
            "no.parquet",
        ),
    },
    "doctor": {
        "no run": (lambda at: [at / "no"], "a folder or file that exists"),
        "still going": (lambda at: [run_folder(at / "r")], "holds no finished step yet"),
        "unknown check": (lambda at: ["--only", "nothing"], "nothing"),
    },
}


def a_row(file: Path) -> Path:
    """A row whose columns no set has."""
    file.write_text('{"a": 1}\n')
    return file


def pretraining(at: Path, *, model: Path | str | None = None, rollouts: Path | None = None, row: dict | None = None):
    """Arguments of ``pretrain-critic`` that are right but for what is given."""
    if model is None:
        from critic import harness

        model = harness.save_model(at / "model")
    if rollouts is None:
        rollouts = at / "rollouts.jsonl"
        row = row or {"prompt": [1, 2], "response": [3], "reward": 1.0}
        rollouts.write_text(json.dumps(row) + "\n")
    return ["--model", model, "--rollouts", rollouts, "--out", at / "critic"]


def test_every_command_has_cases():
    assert CASES.keys() == declared().keys()


@pytest.mark.parametrize(
    ("command", "case"),
    [(command, case) for command, cases in CASES.items() for case in cases],
)
def test_bad_input_is_one_line_and_status_2(command, case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments, says = CASES[command][case]
    assert main([command, *map(str, arguments(tmp_path))]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    if isinstance(says, str):
        assert says in lines[0]
    assert not (tmp_path / "o").exists() or case == "out is taken" or command in ("demo", "gate", "lab")


def test_the_traceback_is_shown_on_demand(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        main(["--debug", "plot", str(tmp_path / "no"), "--out", str(tmp_path / "o")])


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    """Nothing listens where the hub should be; in a process of its own, because the address is read at import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rollouts = tmp_path / "r.jsonl"
    rollouts.write_text(json.dumps({"prompt": [1], "response": [2], "reward": 1.0}) + "\n")
    code = "import sys; from verl_dvpo.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--model", "nobody/nothing", "--rollouts", str(rollouts), "--out", str(tmp_path / "o")]
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", code, "pretrain-critic", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # the hub's client may say before that it tries again
    assert line.startswith("error: ")
    assert "nobody/nothing" in line


def test_what_the_system_says_is_named_with_its_file(tmp_path):
    file = tmp_path / "f"
    file.write_text("")
    with pytest.raises(OSError, match="f") as caught:
        (file / "inside").mkdir()
    assert one_line(caught.value) == f"{file / 'inside'}: Not a directory"
    assert one_line(OSError("We could not\n  reach it")) == "We could not reach it"


def test_bars_are_off_where_there_is_no_terminal(tmp_path):
    """tqdm's own bars and transformers', in the command's process and in its children."""
    code = (
        "import sys; from verl_dvpo import cli; cli.quiet_bars(sys.stderr.isatty()); import subprocess\n"
        "subprocess.run([sys.executable, '-c', 'import tqdm; list(tqdm.tqdm(range(3)))'], check=True)\n"
        "from transformers.utils import logging; list(logging.tqdm(range(3), desc='Loading weights'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in QUIET}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_group_of_commands_is_installed_once():
    """What is in front is what runs: the fixture of this module would otherwise test another checkout."""
    ours = [entry for entry in metadata.entry_points(group=GROUP) if entry.value.startswith("verl_dvpo.")]
    assert sorted(entry.name for entry in ours) == sorted(declared())
