# SPDX-License-Identifier: Apache-2.0
"""The manifest of a saved critic: which family and sizes it has, what made it, and which files belong to it.

``manifest.json`` is written last. A folder without it was not written to the end. It names each file with its size and
SHA-256, and ends with the SHA-256 of itself, so that whatever is lost or changed is found before anything is loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from verl_dvpo.saved.files import inside, read_json, sha256, write_text

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The statement of a folder about itself.

    Attributes:
        kind: ``checkpoint`` (of a run, to resume from) or ``critic`` (to use, or to start from).
        family: registered name or import path of the value family.
        num_outputs: D, the head's outputs per token.
        hidden_size: H of the backbone.
        layout: the settings that fix what the outputs mean, and their number; all must agree to load.
        settings: every setting of the family.
        facts: what made it: versions, git revision, platform, seeds, hash of the configuration, step.
        files: name -> ``{"bytes": ..., "sha256": ...}``.
    """

    kind: str
    family: str
    num_outputs: int
    hidden_size: int
    layout: dict[str, Any]
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of_files(self, files: Mapping[str, dict[str, Any]]) -> "Manifest":
        """Returns the same, vouching for ``files``."""
        return Manifest(**{**asdict(self), "files": dict(sorted(files.items()))})


def describe_file(path: Path) -> dict[str, Any]:
    """Returns ``{"bytes": ..., "sha256": ...}`` of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Describes the files of ``folder``, all but the manifest by default: name -> ``describe_file``."""
    return {name: describe_file(inside(folder, name)) for name in (file_names(folder) if names is None else names)}


def file_names(folder: Path) -> list[str]:
    """Lists the files below ``folder``, the manifest left out, as sorted relative names."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != FILE)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json``, atomically; call it when all other files are there."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_text(folder / FILE, _text({**content, "sha256": _seal(content)}))


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Reads and checks ``manifest.json``.

    Args:
        folder: of a checkpoint of the critic, or of an exported one.
        kind: what it must be, see ``Manifest``.

    Raises:
        ValueError: there is none, it was changed, another version wrote it, or it describes something else.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {FILE}; it was not written to the end, or not by this package; take an earlier checkpoint"
        )
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file} has the format {content.get('format')!r}; this version of verl-dvpo reads {FORMAT}; use the "
            f"version that wrote it, {_version(content)}"
        )
    as_written = file.read_text(encoding="utf-8") == _text(content)
    if content.pop("sha256", None) != _seal(content) or not as_written:
        raise ValueError(f"{file} was changed after it was written; take a whole copy of the folder")
    del content["format"]
    missing = {f.name for f in fields(Manifest)} ^ content.keys()
    if missing:
        raise ValueError(f"{file} lacks or adds {', '.join(sorted(missing))}; take a whole copy of the folder")
    if content["kind"] != kind:
        raise ValueError(f"{folder} holds a {content['kind']!r}; a {kind!r} is allowed here; {_HINTS[kind]}")
    return Manifest(**content)


#: What to do where the other kind was given.
_HINTS = {
    "critic": "make one of a run's checkpoint with `verl-dvpo export RUN --out DIR`",
    "checkpoint": "give the folder of a run, which holds global_step_N",
}


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, contents: bool = True) -> None:
    """Compares files with the manifest.

    Args:
        folder: that the manifest describes.
        manifest: from ``read_manifest``.
        names: which of its files; all by default.
        contents: compares contents too, not only sizes.

    Raises:
        ValueError: names the first file that is missing, or has another size or contents.
    """
    for name in manifest.files if names is None else names:
        expected, path = manifest.files[name], inside(folder, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing, and {FILE} names it; take a whole copy of the folder")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes; {FILE} says {expected['bytes']}; take a whole copy")
        if contents and sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} was changed after it was written ({FILE} has another SHA-256); take a whole copy")


def differences(manifest: Manifest, family: str, layout: Mapping[str, Any]) -> list[str]:
    """Lists what keeps a saved critic from being loaded into a family: ``name is saved, and here wanted``.

    Args:
        manifest: of the saved critic.
        family: name of the family that shall load it.
        layout: its settings that fix what the outputs mean.
    """
    if manifest.family != family:
        return [f"family is {manifest.family!r} there and {family!r} here"]
    names = sorted(manifest.layout.keys() | layout.keys())
    pairs = ((name, manifest.layout.get(name), layout.get(name)) for name in names)
    return [f"{name} is {saved!r} there and {wanted!r} here" for name, saved, wanted in pairs if saved != wanted]


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _version(content: Mapping[str, Any]) -> str:
    facts = content.get("facts")
    versions = facts.get("versions") if isinstance(facts, dict) else None
    return str(versions.get("verl-dvpo", "unknown")) if isinstance(versions, dict) else "unknown"
