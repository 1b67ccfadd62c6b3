# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of a run, and what it keeps to itself; and writes that are whole or nothing."""

import json
from pathlib import Path

import pytest

from verl_dvpo.saved.facts import base_name, program_facts, run_facts
from verl_dvpo.saved.files import LONGEST_JSON, read_json, whole_folder, write_text


def config(**ray) -> dict:
    return {
        "data": {"seed": 3, "shuffle": True},
        "critic": {"value": {"head_seed": 1, "target_seed": 2}, "data_loader_seed": None},
        "algorithm": {"adv_estimator": "dvpo", "gamma": 1.0, "lam": 0.95, "value": {}},
        "ray_kwargs": ray,
    }


def test_seeds_and_hash_of_a_run():
    facts = run_facts(config())
    assert facts["seeds"] == {"critic.value.head_seed": 1, "critic.value.target_seed": 2, "data.seed": 3}
    assert facts["algorithm"] == {"adv_estimator": "dvpo", "gamma": 1.0, "lam": 0.95}
    turned = dict(reversed(config(runtime_env={"env_vars": {"TOKEN": "secret"}}).items()))
    assert run_facts(turned)["config_sha256"] == facts["config_sha256"]
    assert "secret" not in json.dumps(run_facts(turned))
    assert run_facts({**config(), "data": {"seed": 4}})["config_sha256"] != facts["config_sha256"]


def test_facts_of_the_program_name_no_machine(tmp_path):
    facts = program_facts()
    assert facts["versions"]["verl-dvpo"]
    assert facts.keys() == {"versions", "git_revision", "platform"}
    assert base_name(str(tmp_path)) == tmp_path.name
    assert base_name("/nowhere/model") == "model"
    assert base_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "deep" / "out"

    def break_off() -> None:
        with whole_folder(out) as partial:
            (partial / "half").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        break_off()
    assert list((tmp_path / "deep").iterdir()) == []
    with whole_folder(out) as partial:
        write_text(partial / "all", "ä\n")
    assert [path.name for path in out.iterdir()] == ["all"]
    with pytest.raises(ValueError, match="does not exist or is empty"), whole_folder(out):
        pass
    assert (out / "all").read_text(encoding="utf-8") == "ä\n"


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b'{"a": 1'])
def test_what_is_no_json_object_is_named(content, tmp_path):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.json"):
        read_json(tmp_path / "m.json")


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    with open(tmp_path / "m.json", "wb") as file:
        file.truncate(LONGEST_JSON + 1)
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_json(Path(tmp_path / "m.json"))
