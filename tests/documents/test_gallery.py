# SPDX-License-Identifier: Apache-2.0
"""The gallery has every measured file, with a command that exists, and its numbers are those of its page or files."""

import re
import subprocess

import pytest
from site_pages import DOCS, ROOT, gallery

ENTRIES = gallery.entries()
NUMBER = re.compile(r"\d+\.\d+|\d+ %")


def test_every_measured_file_belongs_to_one_entry():
    listed = [file for entry in ENTRIES for file in gallery.files_of(entry)]
    missing = sorted({file.parent.relative_to(DOCS).as_posix() for file in set(gallery.measured_files()) - set(listed)})
    assert not missing, (
        f"give docs/{', docs/'.join(missing)} an entry with its command in scripts/site_pages/gallery.yaml"
    )
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["title"])
def test_an_entry_is_whole(entry):
    assert all((DOCS / path).exists() for path in [entry["page"], *entry["files"], *entry.get("show", [])])
    texts = [DOCS / entry["page"], *(file for file in gallery.files_of(entry) if file.suffix in (".md", ".json"))]
    text = "\n".join(file.read_text() for file in texts)
    unknown = [number for number in NUMBER.findall(entry["says"]) if number not in text]
    assert not unknown, (
        f"{unknown} stand neither in docs/{entry['page']} nor in the entry's files; write what they say now"
    )
    for line in entry["command"].splitlines():
        program, *words = line.split()
        assert program in ("verl-dvpo", "python", "make")
        assert all((ROOT / word).exists() for word in words if word.startswith(("examples/", "benchmarks/", "tests/")))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["title"])
def test_an_entry_names_a_commit_that_wrote_its_files(entry):
    shown = gallery.commit_of(gallery.files_of(entry))
    if not shown:
        pytest.skip("no history of git here: the page says so in place of a commit")
    commit = shown.split(" ")[0]
    changed = subprocess.run(
        ["git", "show", "--format=", "--name-only", "-m", commit], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert {file.relative_to(ROOT).as_posix() for file in gallery.files_of(entry)} & set(changed)
    assert f"`{shown}`" in gallery.page()
