# SPDX-License-Identifier: Apache-2.0
"""Checks of what is installed, from the packages' own metadata; nothing is imported."""

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from verl_dvpo.compat import versions
from verl_dvpo.doctor.checks import Machine, check, remedy
from verl_dvpo.doctor.lines import Line, ok, problem, warning

OURS = "verl-dvpo"
#: The packages that have a line of their own; what else is required has one line together.
NAMED = ("torch", "transformers", "tensordict", "ray", "TransferQueue")


def installed(package: str) -> str | None:
    """Returns the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(distribution: str) -> dict[str, Requirement]:
    """Returns what a distribution requires without extras, by normalised name; nothing if it is not installed."""
    try:
        required = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(text) for text in required]
    return {
        canonicalize_name(each.name): each
        for each in parsed
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }


@check(
    "python",
    about="the version of Python",
    remedy="make a virtual environment with Python 3.11, and install again",
)
def python(machine: Machine) -> Line:
    found = platform.python_version()
    try:
        wanted = metadata.metadata(OURS)["Requires-Python"]
    except metadata.PackageNotFoundError:
        wanted = ""
    if wanted and not SpecifierSet(wanted).contains(found, prereleases=True):
        return problem("python", f"Python {found}; {OURS} needs {wanted}", remedy("python"))
    return ok("python", f"Python {found}")


@check(
    "verl",
    about="the version of verl, against those that this package was tested with",
    remedy="pip install verl==0.9.1; VERL_DVPO_ANY_VERL=1 lets another version start, for trying it",
)
def verl(machine: Machine) -> Line:
    found = installed("verl")
    if found is None:
        return problem("verl", f"it is not installed; {versions.fitting()}", remedy("verl"))
    if found in versions.SUPPORTED:
        return ok("verl", f"verl {found}")
    text = f"verl is {found}; {versions.fitting()}"
    if machine.environment.get(versions.OVERRIDE_ENV) == "1":
        return warning("verl", f"{text}; {versions.OVERRIDE_ENV}=1 lets it start", remedy("verl"))
    return problem("verl", text, remedy("verl"))


@check(
    "packages",
    about="torch, transformers, tensordict, ray, TransferQueue, and all else that verl-dvpo and verl require",
    remedy="pip install 'NAME<its range>', with the range that the line names; or the whole lock: `make install`",
)
def packages(machine: Machine) -> Iterator[Line]:
    """One line for each named package, and one for the others together or for each that does not fit."""
    ours, theirs = requirements(OURS), requirements("verl")
    named: dict[str, str] = {canonicalize_name(name): name for name in NAMED}
    others = [name for name in ours | theirs if name not in named and name != "verl"]
    fitting = 0
    for name in [*named, *others]:
        shown = named.get(name, name)
        line = _fits(shown, ours.get(name), theirs.get(name))
        fitting += line.state == "ok" and name in others
        if line.state != "ok" or name in named:
            yield line
    yield ok("packages", f"{fitting} more, as {OURS} and verl require them")


def _fits(name: str, ours: Requirement | None, theirs: Requirement | None) -> Line:
    """Compares the installed version with what we require (a problem) and with what verl requires (a warning)."""
    found = installed(name)
    ranges = [f"{each.specifier}" for each in (ours, theirs) if each is not None and str(each.specifier)]
    install = f"pip install '{name}{ranges[0] if ranges else ''}'"
    if found is None:
        if ours is None and theirs is None:
            return ok(name, "not installed and not required")
        return problem(name, f"it is not installed; {' and '.join(ranges) or 'any version'} is needed", install)
    for each, who, make in ((ours, OURS, problem), (theirs, "verl", warning)):
        if each is not None and not each.specifier.contains(found, prereleases=True):
            return make(
                name, f"{name} is {found}; {who} needs {each.specifier}", f"pip install '{name}{each.specifier}'"
            )
    return ok(name, f"{name} {found}")


@check(
    "entry point",
    about="whether this package says to verl that it is a plugin",
    remedy="install it: `pip install --no-deps .` in its checkout; a folder on PYTHONPATH alone is not enough",
)
def entry_point(machine: Machine) -> Line:
    found = [each for each in metadata.entry_points(group="verl.plugins") if each.value.startswith("verl_dvpo")]
    if not found:
        return problem("entry point", "no installed package names verl_dvpo in verl.plugins", remedy("entry point"))
    policy = machine.environment.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "verl_dvpo" not in policy.split(","):
        text = f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}, so verl does not load it"
        return problem("entry point", text, "unset VERL_USE_EXTERNAL_PLUGINS, or add verl_dvpo to it")
    return ok("entry point", f"{found[0].value} in verl.plugins of {OURS} {installed(OURS) or '(unknown version)'}")
