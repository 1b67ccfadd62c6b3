# SPDX-License-Identifier: Apache-2.0
"""A study's folder that somebody else made is data: nothing in it runs, and no name in it leads out of it."""

import io
import json
import pickle
from pathlib import Path

import pytest
from fake import FakeTrainer, study_of

from verl_dvpo.bench.study.collect import collect
from verl_dvpo.bench.study.config import parse_study
from verl_dvpo.bench.study.heads import heads_note
from verl_dvpo.bench.study.results import load_results
from verl_dvpo.bench.study.runner import run_study


class Payload:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def disguises(trace: Path) -> dict[str, bytes]:
    return {
        "pickle": pickle.dumps(Payload(trace)),
        "yaml": f"!!python/object/apply:os.system ['touch {trace}']\n".encode(),
        "yaml in a field": f"name: !!python/object/apply:os.system ['touch {trace}']\n".encode(),
    }


def test_a_payload_of_this_test_would_run(tmp_path):
    pickle.loads(disguises(tmp_path / "trace")["pickle"])
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("disguise", disguises(Path()))
def test_nothing_in_a_study_s_folder_runs(disguise, out, tmp_path):
    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0])
    assert run_study(study, train=FakeTrainer(), stream=io.StringIO()) == []
    content = disguises(tmp_path / "trace")[disguise]
    refused = []
    for file in sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size):
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            heads_note(load_results(out).study)
        except ValueError:  # json's and unicode's errors are of this kind
            refused.append(file.name)
        file.write_bytes(before)
    assert {"study.json", "run.json", "metrics.jsonl", "config.yaml"} <= set(refused)
    assert not (tmp_path / "trace").exists()
    assert collect(out, tmp_path / "collected")


@pytest.mark.parametrize("name", ["..", ".", "../ppo", "/tmp/ppo", "a/b", "ppo\n"])
@pytest.mark.parametrize("axis", ["algorithms", "noises", "tasks"])
def test_no_name_leads_out_of_the_folder(name, axis, out):
    entries = {
        "algorithms": {"name": name, "algorithm": "ppo"},
        "noises": {"name": name, "kind": "flip", "rate": 0.3},
        "tasks": {"name": name, "task": "demo", "in_domain": ["demo_addition"]},
    }
    content = json.loads(study_of(out).model_dump_json(exclude_defaults=True)) | {axis: [entries[axis]]}
    with pytest.raises(ValueError, match="name is "):
        parse_study(content)
