# SPDX-License-Identifier: Apache-2.0
"""Makes the configuration reference: each field of ``config/`` with its default, type, bounds and comment.

Names, defaults and comments come from the YAML; types from the dataclasses and models that check the fields.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from site_pages import CONFIG, declared

#: Groups in the order of the page, with what each is for. Groups that are not named follow by name.
GROUPS = {
    "algorithm": "`algorithm=NAME` chooses critic, estimator and the actor's loss. `_with_critic`: what they share.",
    "critic_family": "The critic of an algorithm; fields are `critic.*`. Each file starts from `_base`.",
    "trainer_mode": "`trainer_mode=NAME`: how steps follow each other.",
    "noise": "`noise=NAME` corrupts the reward; fields are `noise.*`, and each file starts from `_base`.",
    "platform": "`platform=NAME`: the machine.",
    "critic_engine": "`+critic_engine=NAME`: another engine for the critic, put after the algorithm.",
    "task": "`+task=NAME`: the tasks that are made on this machine.",
    "recipe": "`+recipe=NAME`: a model and the size of a run.",
    "ladder": "`+ladder=NAME`: the loss of DVPO, one term more at each rung.",
    "sweep": "`+sweep=NAME` with `python -m verl_dvpo.train`.",
}


@dataclass(frozen=True)
class Field:
    """One field of a YAML file.

    Attributes:
        path: dotted path in the file.
        value: as the file writes it; None for a section.
        comment: what stands above it.
    """

    path: str
    value: str | None
    comment: str


def fields_of(text: str) -> list[Field]:
    """Reads a YAML file's fields with the comments above them; a field without one shares that of the line above it."""
    lines = text.splitlines()
    found: list[Field] = []

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        shared = ""
        for key, value in node.value:
            line = key.start_mark.line
            is_section = isinstance(value, yaml.MappingNode) and bool(value.value)
            shared = _comment_above(lines, line) or ("" if line and not lines[line - 1].strip() else shared)
            if not prefix and key.value == "defaults":
                continue
            written = None if is_section else _written(text, value)
            found.append(Field(f"{prefix}{key.value}", written, shared))
            if is_section:
                walk(value, f"{prefix}{key.value}.")

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return found


def _written(text: str, value: yaml.Node) -> str:
    """Returns a value as the file has it, a list of several lines in one."""
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        return "[" + ", ".join(f"'{each.value}'" for each in value.value) + "]"
    return text[value.start_mark.index : value.end_mark.index].strip()


def heading_of(text: str) -> str:
    """Returns the comment with which a YAML file begins, without Hydra's directive."""
    lines = []
    for line in text.splitlines():
        if line.startswith("#"):
            lines.append(line.lstrip("# ").strip())
        elif line.strip():
            break
    return " ".join(line for line in lines if line and not line.startswith("@package"))


def type_of(group: str, file: str, path: str) -> str:
    """Returns the type of a field, or what is allowed, as the class that checks it says; "" where none of ours does."""
    for prefix, cls in declared.checkers(group, file):
        if path.startswith(prefix):
            return declared.type_of(cls, path.removeprefix(prefix).split("."))
    return ""


def page() -> str:
    """Returns the page of Markdown."""
    groups = [
        *GROUPS,
        *sorted(folder.name for folder in CONFIG.iterdir() if _is_group(folder) and folder.name not in GROUPS),
    ]
    parts = [
        "# Configuration",
        "Made from `config/` and the classes that check it. Fields are YAML, or overrides on the command line "
        "(`critic.value.num_heads=5`); all that [verl](https://github.com/verl-project/verl) has can be set beside "
        "them. "
        "An unknown field or a value outside its bounds is refused before Ray starts, with the field and what is "
        "allowed. `???` has to be given; `${...}` follows another field.",
    ]
    for group in groups:
        files = sorted((CONFIG / group).glob("*.yaml"))
        if files:
            parts += [f"## {group}", GROUPS.get(group, f"`+{group}=NAME`.")]
            parts += [section(group, file) for file in files]
    return "\n\n".join(parts) + "\n"


def section(group: str, file: Path) -> str:
    """Returns one file's part of the page."""
    text = file.read_text()
    prefix = "critic." if group == "critic_family" else ""
    written = [replace(field, path=prefix + field.path) for field in fields_of(text)]
    rows = [_row(group, file.stem, field) for field in written if field.comment]
    table = "\n".join(["| field | default | type, or what is allowed | |", "| --- | --- | --- | --- |", *rows])
    heading = f"### {group}/{file.stem}"
    return "\n\n".join(part for part in (heading, heading_of(text), table if rows else "") if part)


def cell(text: str) -> str:
    """Escapes what would end a cell of a table, or be read as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _row(group: str, file: str, field: Field) -> str:
    value = "" if field.value is None else f"`{cell(field.value)}`"
    allowed = "" if field.value is None else cell(type_of(group, file, field.path))
    return f"| `{field.path}` | {value} | {allowed} | {cell(field.comment)} |"


def _is_group(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.yaml"))


def _comment_above(lines: list[str], line: int) -> str:
    found: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().lstrip("#").strip())
    return " ".join(part for part in found if not part.startswith("@package"))
