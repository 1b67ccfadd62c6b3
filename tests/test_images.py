# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles, the compose file and the devcontainer: linted, and what they name exists.

What they build is tried by ``scripts/try_image.py``, which needs root and some gigabytes.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted(ROOT.glob("docker/Dockerfile.*"))
HOME = "/home/dvpo/verl-dvpo"
DIGEST = "@sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def dockerfiles(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("dockerfiles")


@pytest.fixture
def try_image(dockerfiles):
    return importlib.import_module("try_image")


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def image(request, dockerfiles):
    return request.param, dockerfiles.read_stages(request.param)


def hadolint() -> str:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which("hadolint", path=beside)
    assert found, "hadolint is missing; run `make install`"
    return found


def test_there_are_two():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path, tmp_path):
    command = [hadolint(), "--no-color", "--config", ROOT / ".hadolint.yaml"]
    done = subprocess.run([*command, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(path.read_text() + "RUN cd /tmp && sudo ls\n")
    assert subprocess.run([*command, worse], capture_output=True).returncode == 1


def test_what_is_copied_exists_and_is_not_ignored(image, dockerfiles):
    _, stages = image
    patterns = dockerfiles.ignore_patterns(ROOT)
    built = {stage.name for stage in stages}
    copied = []
    for step in (step for stage in stages for step in stage.steps if step.name in ("COPY", "ADD")):
        *sources, _ = step.words()
        if "from" in step.options:
            assert step.options["from"] in built
        else:
            copied += sources
    assert len(copied) > 5
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if dockerfiles.ignored(source, patterns)] == []


def test_scripts_exist_and_are_copied_before_they_run(image):
    path, stages = image
    ran = 0
    for stage in stages:
        there = []
        for step in stage.steps:
            if step.name == "COPY" and "from" not in step.options:
                there += step.words()[:-1]
            for script in re.findall(r"\b(?:bash|python3?) (\S+\.(?:sh|py))", step.value if step.name == "RUN" else ""):
                ran += 1
                assert (ROOT / script).is_file()
                assert any(script == each or script.startswith(f"{each}/") for each in there)
    assert ran >= 2
    for script in re.findall(r"bash (\S+\.sh)", path.read_text()):
        assert (ROOT / script).is_file()


def test_both_stages_start_from_the_argument_and_a_release_is_checked_first(image):
    path, stages = image
    text = path.read_text()
    (name,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, flags=re.MULTILINE)
    assert [stage.base for stage in stages] == [name, name]
    first = next(step for step in stages[0].steps if step.name == "RUN")
    assert first.value == 'bash scripts/check_base_image.sh "$BASE_IMAGE" "$RELEASE"'
    assert re.search(r"^FROM \S*[^}\s](?: AS \w+)?$", text, flags=re.MULTILINE) is None  # no image by name


@pytest.mark.parametrize(
    ("base", "release", "status"),
    [
        ("python:3.11.13-slim-bookworm", "0", 0),
        ("python:3.11.13-slim-bookworm", "1", 2),
        (f"python:3.11.13-slim-bookworm{DIGEST}", "1", 0),
        (f"python:3.11.13-slim-bookworm{DIGEST[:-1]}", "1", 2),
        (f"python{DIGEST.upper()}", "1", 2),
        ("python:3.11.13-slim-bookworm", "yes", 2),
        ("", "0", 1),
    ],
)
def test_a_release_has_a_digest(base, release, status):
    command = ["bash", str(ROOT / "scripts" / "check_base_image.sh"), base, release]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert bool(done.stderr) == (status != 0)


def test_the_user_is_not_root_and_owns_what_he_writes(image):
    _, stages = image
    last = stages[-1].steps
    (user,) = [step.value for step in last if step.name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    (made,) = [step.value for step in last if "useradd" in step.value]
    assert f"--uid {user.split(':')[0]} dvpo" in made
    assert all(step.options["chown"] == user for step in last if step.name == "COPY")
    assert any(step.name == "RUN" and f"chown {user} . runs" in step.value for step in last)
    assert [step.value for step in last if step.name == "WORKDIR"] == [HOME]


def test_the_health_check_is_the_doctor(image):
    from verl_dvpo.doctor.commands import doctor

    _, stages = image
    (check,) = [step for step in stages[-1].steps if step.name == "HEALTHCHECK"]
    assert json.loads(check.value.removeprefix("CMD ")) == ["verl-dvpo", "doctor", "--quick"]
    assert {"interval", "timeout", "start-period"} <= check.options.keys()
    assert "quick" in doctor.__annotations__


def arguments_of(image_name: str, dockerfiles) -> set[str]:
    path = ROOT / "docker" / image_name
    stages = dockerfiles.read_stages(path)
    return {step.value.partition("=")[0] for stage in stages for step in stage.steps if step.name == "ARG"}


def test_compose_runs_the_image_with_a_tensorboard_beside_it(dockerfiles):
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    train, board = compose["services"]["train"], compose["services"]["tensorboard"]
    assert (ROOT / "docker" / train["build"]["context"] / train["build"]["dockerfile"]).is_file()
    assert set(train["build"]["args"]) <= arguments_of("Dockerfile.cpu", dockerfiles)
    assert train["build"]["args"]["BASE_IMAGE"].endswith(
        re.findall(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "docker" / "Dockerfile.cpu").read_text(), flags=re.MULTILINE)[0]
        + "}"
    )
    assert train["image"] == board["image"]
    assert train["volumes"] == board["volumes"] == [f"${{RUNS:-runs}}:{HOME}/runs"]
    assert "runs" in compose["volumes"]
    assert board["command"][:3] == ["tensorboard", "--logdir", "runs"]
    assert all(port.startswith("127.0.0.1:") for port in board["ports"])
    assert train["command"][:2] == ["make", "train"]


def test_the_devcontainer_is_the_cpu_image(dockerfiles):
    folder = ROOT / ".devcontainer"
    content = json.loads((folder / "devcontainer.json").read_text())
    assert (folder / content["build"]["dockerfile"]).resolve() == ROOT / "docker" / "Dockerfile.cpu"
    assert (folder / content["build"]["context"]).resolve() == ROOT
    assert set(content["build"]["args"]) <= arguments_of("Dockerfile.cpu", dockerfiles)
    assert content["workspaceFolder"] == HOME
    assert f"target={HOME},type=bind" in content["workspaceMount"]
    assert content["remoteUser"] == "dvpo"
    assert any(f"target={HOME}/.venv,type=volume" in each for each in content["mounts"])  # not hidden by the checkout


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".git", True),
        (".git/config", True),
        ("verl_dvpo/__pycache__", True),
        ("a/b/__pycache__/x.pyc", True),
        ("__pycache__", True),
        ("runs/demo", True),
        ("docs/runs", False),
        (".github", False),
        ("verl_dvpo/cli.py", False),
    ],
)
def test_ignored_as_docker_does(path, expected, dockerfiles):
    assert dockerfiles.ignored(path, [".git", "runs", "**/__pycache__"]) is expected


def test_a_dockerfile_is_read(tmp_path, dockerfiles):
    file = tmp_path / "Dockerfile"
    file.write_text(
        "# a comment\nARG BASE=a:1\nARG OTHER=x\nFROM ${BASE} AS first\nRUN one && \\\n    two\n"
        "FROM $BASE\nCOPY --from=first --chown=1:1 /a b\nCMD [\"x\", \"y z\"]\n"
    )  # fmt: skip
    first, second = dockerfiles.read_stages(file, {"BASE": "b:2"})
    assert (first.name, first.base, second.name, second.base) == ("first", "b:2", "1", "b:2")
    assert first.steps[0].value.split() == ["one", "&&", "two"]
    assert dict(second.steps[0].options) == {"from": "first", "chown": "1:1"}
    assert second.steps[0].words() == ["/a", "b"]
    assert second.steps[1].words() == ["x", "y z"]
    assert dockerfiles.replaced("$A/${B}:$C", {"A": "1", "B": "2"}) == "1/2:"


def test_steps_that_need_no_root_do_what_docker_does(tmp_path, try_image, monkeypatch):
    context, root = tmp_path / "context", tmp_path / "root"
    (context / "folder" / "__pycache__").mkdir(parents=True)
    for name in ("folder/a", "folder/__pycache__/b", "file"):
        (context / name).write_text(name)
    (context / ".dockerignore").write_text("**/__pycache__\n")
    monkeypatch.setattr(try_image, "CONTEXT", context)
    (tmp_path / "Dockerfile").write_text(
        "FROM python:1\nARG WORD\nARG OTHER=o\nENV PATH=/x:$PATH\nWORKDIR /home/me\n"
        "COPY folder here\nCOPY file folder/a ./\nCOPY file renamed\nUSER 7:7\n"
    )
    (stage,) = try_image.read_stages(tmp_path / "Dockerfile")
    container = try_image.Container(root)
    for step in stage.steps:
        try_image.run_step(step, container, {}, {"WORD": "w"}, {})
    made = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}
    inside = {"here/a": "folder/a", "file": "file", "a": "folder/a", "renamed": "file"}
    assert made == {f"home/me/{name}": text for name, text in inside.items()}
    assert container.arguments == {"WORD": "w", "OTHER": "o"}
    assert container.environment["PATH"] == f"/x:{try_image.PATH}"
    assert container.user == "7:7"
    with pytest.raises(ValueError, match="instruction is ONBUILD"):
        try_image.run_step(try_image.Step("ONBUILD", "x"), container, {}, {}, {})
