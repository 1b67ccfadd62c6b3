# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of a Dockerfile in order without a Docker daemon, in clean roots that debootstrap makes; needs root.

    python scripts/try_image.py docker/Dockerfile.cpu --work /var/tmp/image

Each ``FROM`` starts from a root with Debian and its Python, which stands for the image ``python:*-bookworm``: the same
system, and Debian's own patch release of Python 3.11. ``COPY`` obeys ``.dockerignore``, ``RUN`` runs under chroot as
the user of that step, with its ``ENV``, ``ARG`` and ``WORKDIR``. At the end come the image's ``HEALTHCHECK`` and its
``CMD``, ``make train``, for three training steps. Not tried are the layers' format, the base image itself and the
network of a container. All mounts and processes are in namespaces of their own, and gone when this ends.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from dockerfiles import Stage, Step, ignore_patterns, ignored, read_stages, replaced

CONTEXT = Path(__file__).resolve().parents[1]
INSIDE = "VERL_DVPO_TRY_IMAGE"
#: What stands in the image ``python:*-slim``: an interpreter, its headers, and certificates.
PACKAGES = "ca-certificates,python3,python3-venv,python3-dev"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Runs ``make train``'s own words for three steps.
THREE_STEPS = (
    "ARGS=trainer.total_training_steps=3 trainer.test_freq=3 data.train_batch_size=8 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=8 critic.ppo_mini_batch_size=4"
)


@dataclass
class Container:
    """One stage on its way: its root and what later steps inherit."""

    root: Path
    user: str = "0:0"
    folder: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    check: str = ""
    command: str = ""

    def run(self, command: list[str], passed: dict[str, str]) -> None:
        """Runs a command in the root as the present user.

        Args:
            command: its words.
            passed: variables that Docker would not set: of the network that this machine has.
        """
        home = "/root" if self.user.startswith("0") else "/home/dvpo"
        variables = {"HOME": home, **passed, **self.arguments, **self.environment}
        inside = f'cd {shlex.quote(self.folder)} && exec "$@"'
        chroot = ["chroot", f"--userspec={self.user}", str(self.root), "/bin/sh", "-c", inside, "sh", *command]
        subprocess.run(chroot, env=variables, check=True, stdin=subprocess.DEVNULL)

    def path(self, name: str) -> Path:
        """Returns the place on this machine of a path in the container."""
        return self.root / os.path.normpath(os.path.join(self.folder, name)).lstrip("/")


def main() -> int:
    """Runs all stages and prints the time of each step."""
    options = read_options()
    if os.environ.get(INSIDE) != "1":
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv]
        os.execvpe(own[0], own, {**os.environ, INSIDE: "1"})
    arguments = dict(text.split("=", 1) for text in options.build_arg)
    passed = {name: os.environ[name] for name in options.env if name in os.environ}
    work = options.work.resolve()
    base = make_base(work / "base", options)
    done: dict[str, Container] = {}
    for stage in read_stages(options.dockerfile, arguments):
        print(f"== stage {stage.name} from {stage.base}", flush=True)
        done[stage.name] = run_stage(stage, base, work, done, arguments, passed, options)
        last = done[stage.name]
    for what in () if options.build_only else (last.check, last.command):
        start = time.monotonic()
        command = Step("CMD", what).words()
        last.run([*command, THREE_STEPS] if command == ["make", "train"] else command, passed)
        print(f"   {time.monotonic() - start:6.0f} s  {shlex.join(command)}", flush=True)
    return 0


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the roots, about 7 GB; kept")
    parser.add_argument("--suite", default="bookworm", help="of Debian")
    parser.add_argument("--mirror", default="", help="of Debian (default: debootstrap's own)")
    parser.add_argument("--bind", action="append", default=[], help="path of this machine that the roots see too")
    parser.add_argument("--env", action="append", default=[], help="variable of this machine that every step gets")
    parser.add_argument("--again", action="store_true", help="only check and command, in the roots of an earlier call")
    parser.add_argument("--build-only", action="store_true", help="neither check nor command")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def make_base(root: Path, options: argparse.Namespace) -> Path:
    """Makes the root that stands for the base image, or finds the one of an earlier call."""
    if not (root / ".made").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", options.suite, str(root)]
        subprocess.run([*command, *([options.mirror] if options.mirror else [])], check=True)
        (root / ".made").touch()
    return root


def run_stage(
    stage: Stage,
    base: Path,
    work: Path,
    done: dict[str, Container],
    arguments: dict[str, str],
    passed: dict[str, str],
    options: argparse.Namespace,
) -> Container:
    """Runs the steps of one stage in a fresh root."""
    if not stage.base.startswith("python:"):
        raise ValueError(
            f"FROM is {stage.base!r}; python:* is allowed, for which a root can be made without a registry"
        )
    root = work / f"stage-{stage.name}"
    if not options.again:
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(root)], check=True)
    mount(root, options.bind)
    container = Container(root)
    for step in stage.steps:
        if options.again and step.name in ("RUN", "COPY"):
            continue
        start = time.monotonic()
        run_step(step, container, done, {"BASE_IMAGE": stage.base, **arguments}, passed)
        print(f"   {time.monotonic() - start:6.0f} s  {step.name} {' '.join(step.value.split())[:90]}", flush=True)
    return container


def mount(root: Path, binds: list[str]) -> None:
    """Gives a root its system folders, shared memory of its own, names of hosts, and paths of this machine."""
    for source, name in (("/dev", "dev"), ("/sys", "sys")):
        subprocess.run(["mount", "--rbind", source, str(root / name)], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g,mode=1777", "tmpfs", str(root / "dev" / "shm")], check=True)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc", name), root / "etc" / name)
    for name in binds:
        place = root / name.lstrip("/")
        if Path(name).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        subprocess.run(["mount", "--rbind", name, str(place)], check=True)


def run_step(
    step: Step, container: Container, done: dict[str, Container], arguments: dict[str, str], passed: dict[str, str]
) -> None:
    """Runs one instruction.

    Raises:
        ValueError: it is one that is not known here.
    """
    values = {**container.arguments, **container.environment}
    match step.name:
        case "ARG":
            name, has_default, default = step.value.partition("=")
            if has_default or name in arguments:
                container.arguments[name] = arguments.get(name, default)
        case "ENV":
            name, _, value = replaced(step.value, values).partition("=")
            container.environment[name] = value
        case "WORKDIR":
            container.folder = replaced(step.value, values)
            container.path(".").mkdir(parents=True, exist_ok=True)
        case "USER":
            container.user = step.value
        case "RUN":
            container.run(["/bin/sh", "-c", step.value], passed)
        case "COPY":
            copy(step, container, done)
        case "HEALTHCHECK":
            container.check = step.value.removeprefix("CMD").strip()
        case "CMD":
            container.command = step.value
        case _:
            raise ValueError(f"instruction is {step.name}; teach it to {Path(__file__).name}")


def copy(step: Step, container: Container, done: dict[str, Container]) -> None:
    """Copies from the context or from another stage, and gives what was copied to its owner."""
    *sources, target = step.words()
    for source in sources:
        place = container.path(target)
        if "from" in step.options:
            place.parent.mkdir(parents=True, exist_ok=True)
            there = done[step.options["from"]].path(source)
            subprocess.run(["cp", "--archive", "--link", str(there), str(place)], check=True)
        elif (CONTEXT / source).is_dir():
            copy_tree(CONTEXT / source, place)
        else:
            place = place / Path(source).name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CONTEXT / source, place)
        if owner := step.options.get("chown"):
            subprocess.run(["chown", "--recursive", "--no-dereference", owner, str(place)], check=True)


def copy_tree(source: Path, place: Path) -> None:
    """Copies a folder of the context without what ``.dockerignore`` names."""
    patterns = ignore_patterns(CONTEXT)

    def skip(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(CONTEXT)
        return {name for name in names if ignored((inside / name).as_posix(), patterns)}

    shutil.copytree(source, place, ignore=skip, symlinks=True, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
