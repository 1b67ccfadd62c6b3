# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_dvpo.doctor.document``: prints the tables of docs/doctor.md, made from the registries."""

import verl_dvpo.doctor.distribution  # noqa: F401  (registers its symptoms)
from verl_dvpo.doctor import heads
from verl_dvpo.doctor.all import chosen
from verl_dvpo.doctor.symptoms import SYMPTOMS


def checks_table() -> str:
    """Writes the checks of the machine, one row each."""
    rows = ["| check | looks at | fix |", "| --- | --- | --- |"]
    rows += [f"| {_marked(each.name, each.dear)} | {each.about} | {_cell(each.remedy)} |" for each in chosen()]
    return "\n".join(rows)


def symptoms_table() -> str:
    """Writes the symptoms of a run, one row each."""
    rows = ["| line | found where | fix |", "| --- | --- | --- |"]
    rows += [f"| {each.name} | {each.sign} | {_cell(each.remedy)} |" for each in SYMPTOMS.values()]
    rows.append(f"| {heads.NAME} | {heads.SIGN} | {_cell(heads.REMEDY)} |")
    return "\n".join(rows)


def _marked(name: str, dear: bool) -> str:
    return f"{name} [1]" if dear else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(f"{checks_table()}\n\n{symptoms_table()}")
