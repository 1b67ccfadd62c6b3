# SPDX-License-Identifier: Apache-2.0
"""Reads the types of settings from the source of the classes that check them, without importing torch."""

import ast
from collections.abc import Iterator
from functools import cache

from site_pages import CONFIG, ROOT

#: Which class checks the fields below a prefix, in any file of ``config/``.
EVERYWHERE = {"algorithm.value.": "AdvantageConfig", "trainer.value.": "HealthConfig"}
FOLDERS = ("families", "distributional", "noise", "critic")


@cache
def trees() -> dict[str, ast.Module]:
    """Returns the modules that hold settings, by their path in the repository."""
    files = [ROOT / "verl_dvpo" / "health.py"]
    files += [file for folder in FOLDERS for file in sorted((ROOT / "verl_dvpo" / folder).glob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Returns each class of those modules by its name."""
    return {node.name: node for tree in trees().values() for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def families() -> dict[str, str]:
    """Returns for each registered family the name of the class of its settings."""
    found = {}
    for node in classes().values():
        names = [
            call.args[0].value
            for call in node.decorator_list
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_family"
        ]
        for line in node.body:
            if names and isinstance(line, ast.Assign) and line.targets[0].id == "Config":
                found[names[0]] = line.value.id
    return found


@cache
def noises() -> dict[str, str]:
    """Returns for each kind of noise the name of its model."""
    tree = trees()["verl_dvpo/noise/kinds.py"]
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if getattr(target, "id", None) == "KINDS":
            return {key.value: value.id for key, value in zip(node.value.keys, node.value.values, strict=True)}
    raise ValueError("KINDS is missing in verl_dvpo/noise/kinds.py; the reference of noises reads it; name it there")


def fields_of_class(name: str) -> dict[str, tuple[str, str | None]]:
    """Returns each field of a class, those of its bases first: its type or what is allowed, and its default."""
    node = classes().get(name)
    if node is None:
        return {}
    found: dict[str, tuple[str, str | None]] = {}
    for base in node.bases:
        found |= fields_of_class(base.id) if isinstance(base, ast.Name) else {}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if _is_shared(line.annotation):
                continue
            found[line.target.id] = (_allowed(line.annotation), ast.unparse(line.value) if line.value else None)
    return found


def _is_shared(annotation: ast.expr) -> bool:
    """Tells whether an annotation is that of an attribute of the class, which is no field."""
    return isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "ClassVar"


def type_of(cls: str, names: list[str]) -> str:
    """Returns the type of a field, or what is allowed; "" for one that the class does not have.

    Args:
        cls: name of the class.
        names: the field's dotted name in parts.
    """
    name, *rest = names
    declared, _ = fields_of_class(cls).get(name, ("", None))
    if not rest:
        return declared
    inner = INSIDE.get((cls, name)) or INSIDE.get(("", name), "")
    return type_of(inner, rest) if inner in classes() else inner


#: What the parts of a field with parts are: its class, or their type; "" stands for any class.
INSIDE = {
    ("QuantileEnsembleConfig", "coef"): "float or auto",
    ("QuantileEnsembleConfig", "auto"): "AutoConfig",
    ("ScalarEnsembleConfig", "coef"): "float",
    ("ValueFlowConfig", "coef"): "float",
    ("", "where"): "Where",
    ("", "correction"): "Correction",
}


def checkers(group: str, file: str) -> Iterator[tuple[str, str]]:
    """Yields the prefixes of a file's fields, each with the name of the class that checks what is below it."""
    yield from EVERYWHERE.items()
    if group == "noise":
        yield "noise.", noises().get(file, "NoiseConfig")
    if group == "critic_family":
        yield "critic.value.", families()[_family_of(file)] if file != "_base" else "FamilyConfig"


def _family_of(file: str) -> str:
    """Returns the family of a file of ``critic_family``, which may take it from the file that it starts from."""
    lines = [line.strip() for line in (CONFIG / "critic_family" / f"{file}.yaml").read_text().splitlines()]
    named = [line.removeprefix("family: ") for line in lines if line.startswith("family: ")]
    return named[0] if named else _family_of(lines[lines.index("defaults:") + 1].removeprefix("- "))


def _allowed(annotation: ast.expr) -> str:
    """Says a type in words: the description of a model's field where it has one, else the annotation."""
    described = _description(annotation)
    if described is None and isinstance(annotation, ast.Name) and annotation.id in aliases():
        described = _description(aliases()[annotation.id])
    if described:
        return described
    text = ast.unparse(annotation).strip("'\"")
    for name in ("ClassVar", "Literal"):
        text = text.replace(f"{name}[", "").replace("]", "") if text.startswith(name) else text
    return (
        text.replace("None", "null")
        .replace(" | ", " or ")
        .replace("Literal['auto']", "'auto'")
        .replace("Literal['length']", "'length'")
    )


@cache
def aliases() -> dict[str, ast.expr]:
    """Returns the named types of ``verl_dvpo/noise/base.py``."""
    body = trees()["verl_dvpo/noise/base.py"].body
    return {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}


def _description(node: ast.expr) -> str | None:
    for part in ast.walk(node):
        if isinstance(part, ast.keyword) and part.arg == "description" and isinstance(part.value, ast.Constant):
            return str(part.value.value)
    return None
