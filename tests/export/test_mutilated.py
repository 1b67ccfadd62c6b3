# SPDX-License-Identifier: Apache-2.0
"""A thousand mutilated folders and files: each is refused, by a ValueError that names a file, within seconds."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import save_base, save_critic

from verl_dvpo import ValueModel
from verl_dvpo.critic.checkpoints import check_checkpoint
from verl_dvpo.families.registry import family_settings
from verl_dvpo.pretrain.rollouts import read_rollouts
from verl_dvpo.saved.manifest import Manifest, check_files, describe_files, file_names, write_manifest

#: One example may take this long; a hang would take longer.
SECONDS = 5
SETTINGS = family_settings("quantile_ensemble", num_heads=2, num_quantiles=5)


def thorough(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=SECONDS * 1000, derandomize=True, database=None, suppress_health_check=checks
    )


MUTILATIONS = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("zero"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
    st.tuples(st.just("grow"), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("drop")),
)


def mutilated(content: bytes, how: tuple) -> bytes | None:
    """What is left of a file; None where it is gone."""
    kind, *rest = how
    at = int(rest[0] * len(content)) if kind in ("cut", "flip", "zero") else 0
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ rest[1]]) + content[at + 1 :]
    if kind == "zero":
        end = min(len(content), at + rest[1])
        return content[:at] + bytes(end - at) + content[end:]
    return None if kind == "drop" else content + rest[0]


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return save_critic(folder / "critic", save_base(folder / "base"))


@pytest.fixture(scope="module")
def checkpoint(critic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as verl names them; what is in them does not matter before they are found whole."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("model", "optim", "extra_state"):
        shutil.copyfile(critic / "value_head.safetensors", folder / f"{name}_world_size_1_rank_0.pt")
    (folder / "huggingface").mkdir()
    shutil.copyfile(critic / "config.json", folder / "huggingface" / "config.json")
    layout = {**SETTINGS.layout(), "num_outputs": 10}
    manifest = Manifest(
        kind="checkpoint", family="quantile_ensemble", num_outputs=10, hidden_size=16, layout=layout,
        settings=SETTINGS.plain(), facts={"step": 3},
    )  # fmt: skip
    write_manifest(folder, manifest.of_files(describe_files(folder)))
    load_checkpoint(folder)
    return folder


def load_checkpoint(folder: Path) -> None:
    check_files(folder, check_checkpoint(folder, SETTINGS, 10))


def refused(folder: Path, name: str, how: tuple, load) -> None:
    path = folder / name
    whole = path.read_bytes()
    left = mutilated(whole, how)
    if left == whole:  # zeros that were zeros
        return
    try:
        path.unlink()
        if left is not None:
            path.write_bytes(left)
        with pytest.raises(ValueError, match=r".") as caught:
            load(folder)
        assert Path(name).name in str(caught.value)
    finally:
        path.write_bytes(whole)


@thorough(400)
@given(st.data(), MUTILATIONS)
def test_no_mutilated_checkpoint_loads(checkpoint, data, how):
    name = data.draw(st.sampled_from([*file_names(checkpoint), "manifest.json"]))
    refused(checkpoint, name, how, load_checkpoint)


@thorough(250)
@given(st.data(), MUTILATIONS)
def test_no_mutilated_export_loads(critic, data, how):
    name = data.draw(st.sampled_from(sorted({*file_names(critic), "manifest.json"} - {"README.md"})))
    refused(critic, name, how, ValueModel.from_pretrained)


ROWS = [([1, 2], [3, 4, number], number / 7) for number in range(20)]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list]:
    file = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    columns = dict(zip(("prompt", "response", "reward"), map(list, zip(*ROWS, strict=True)), strict=True))
    parquet.write_table(pa.table(columns), file, write_page_checksum=True, row_group_size=8)
    return file, file.read_bytes(), read_rollouts([file], None)


@thorough(400)
@given(MUTILATIONS)
@example(("cut", 0.0))
def test_no_mutilated_parquet_file_gives_other_rollouts(rollouts, how):
    """Page checksums find what changes a value; bytes that hold none, such as the writer's name, may change."""
    file, whole, expected = rollouts
    left = mutilated(whole, how)
    assert left is not None or how == ("drop",)
    file.unlink(missing_ok=True)
    if left is not None:
        file.write_bytes(left)
    found, message = None, ""
    try:
        found = read_rollouts([file], None)
    except ValueError as error:
        message = str(error)
    finally:
        file.write_bytes(whole)
    assert found == expected if found is not None else file.name in message


#: Lines of verl's dump, and what is said of each.
LINES = {
    "not json": ("{", "line 2, is no JSON"),
    "a list": ("[1]", "line 2, holds a list"),
    "no score": ('{"input": "1", "output": "2"}', "has no column 'score'; it has input, output"),
    "text": ('{"input": "1", "output": "2", "score": "good"}', "score is 'good'; a finite number"),
    "numeral": ('{"input": "1", "output": "2", "score": "1.0"}', "score is '1.0'; a finite number"),
    "nan": ('{"input": "1", "output": "2", "score": NaN}', "score is nan; a finite number"),
    "true": ('{"input": "1", "output": "2", "score": true}', "score is True; a finite number"),
    "null": ('{"input": null, "output": "2", "score": 1}', "input is 'None'; text, messages or token ids"),
    "deep": ("[" * 100_000, "line 2, is no JSON"),
}


@pytest.mark.parametrize("line", LINES)
def test_bad_lines_of_a_dump_are_named(line, tmp_path):
    text, message = LINES[line]
    (tmp_path / "1.jsonl").write_text('{"input": [1], "output": [2], "score": 1}\n' + text + "\n")
    with pytest.raises(ValueError, match=message):
        read_rollouts([tmp_path], None)
