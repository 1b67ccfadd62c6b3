# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint is loaded, on files that torch wrote."""

import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from verl_dvpo.saved import checkpoints
from verl_dvpo.saved.manifest import FILE, Manifest, describe_files, write_manifest


def save(folder: Path, step: int, *, ranks: int = 1, critic: bool = True) -> Path:
    """Writes what verl writes, in its order."""
    checkpoint = folder / f"global_step_{step}"
    for part in ("actor", "critic") if critic else ("actor",):
        (checkpoint / part).mkdir(parents=True)
        for rank in range(ranks):
            for content in ("model", "optim", "extra_state"):
                state = {"weight": torch.full((64, 8), float(step)), "step": step}
                torch.save(state, checkpoint / part / f"{content}_world_size_{ranks}_rank_{rank}.pt")
    if critic:
        (checkpoint / "critic" / "family_state.safetensors").write_bytes(bytes(range(64)))
        manifest = Manifest(kind="checkpoint", family="scalar", num_outputs=1, hidden_size=8, layout={}, settings={})
        write_manifest(checkpoint / "critic", manifest.of_files(describe_files(checkpoint / "critic")))
    torch.save({"position": step}, checkpoint / "data.pt")
    checkpoints.point_to(folder, step)
    return checkpoint


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    return tmp_path


def test_the_latest_is_taken_where_it_is_whole(folder):
    assert checkpoints.choose(folder, critic=True) == 10
    assert (folder / checkpoints.TRACKER).read_text() == "10"
    assert sorted(path.name for path in folder.glob(f"{checkpoints.TRACKER}*")) == [checkpoints.TRACKER]


def test_where_nothing_was_saved_there_is_nothing_to_choose(tmp_path):
    assert checkpoints.choose(tmp_path, critic=True) is None
    (tmp_path / "global_step_3" / "actor").mkdir(parents=True)  # cut off before the first tracker
    assert checkpoints.choose(tmp_path, critic=True) is None


def test_one_that_was_never_finished_is_not_looked_at(folder):
    (folder / "global_step_11" / "actor").mkdir(parents=True)
    assert checkpoints.find(folder, critic=True) == (10, [])


def test_what_the_tracker_does_not_name_yet_is_not_taken(folder):
    save(folder, 11)
    checkpoints.point_to(folder, 10)
    assert checkpoints.choose(folder, critic=True) == 10


@pytest.mark.parametrize("tracker", ["", "ten", "10.5"])
def test_a_tracker_without_a_number_is_written_anew(folder, tracker):
    (folder / checkpoints.TRACKER).write_text(tracker)
    assert checkpoints.choose(folder, critic=True) == 10
    assert (folder / checkpoints.TRACKER).read_text() == "10"


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("critic", "critic is missing or empty"),
        ("data.pt", "data.pt is missing, which is written last"),
    ],
)
def test_one_that_lacks_a_part_is_passed_over(folder, gone, reason):
    path = folder / "global_step_10" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert reason in checkpoints.problem(folder / "global_step_10", critic=True)
    assert checkpoints.choose(folder, critic=True) == 2


@pytest.mark.parametrize("file", ["family_state.safetensors", "extra_state_world_size_1_rank_0.pt"])
def test_a_changed_file_of_the_critic_is_passed_over(folder, file):
    path = folder / "global_step_10" / "critic" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert "was changed after it was written" in checkpoints.problem(folder / "global_step_10", critic=True)
    assert checkpoints.choose(folder, critic=True) == 2
    assert checkpoints.problem(folder / "global_step_10", critic=True, read=False) == ""


def test_a_critic_without_its_manifest_is_passed_over(folder):
    (folder / "global_step_10" / "critic" / FILE).unlink()
    assert "has no manifest.json" in checkpoints.problem(folder / "global_step_10", critic=True)
    assert checkpoints.choose(folder, critic=True, read=False) == 2


def test_a_critic_on_megatron_without_its_manifest_is_passed_over(folder):
    """It has no file of rank 0; the backbone's configuration is there before the manifest."""
    critic = folder / "global_step_10" / "critic"
    shutil.rmtree(critic)
    (critic / "model" / "huggingface").mkdir(parents=True)
    (critic / "model" / "huggingface" / "config.json").write_text("{}")
    assert "has no manifest.json" in checkpoints.problem(folder / "global_step_10", critic=True)
    assert checkpoints.choose(folder, critic=True) == 2


def test_a_run_without_a_critic_needs_none(tmp_path):
    save(tmp_path, 4, critic=False)
    assert checkpoints.choose(tmp_path, critic=False) == 4
    with pytest.raises(ValueError, match="critic is missing or empty"):
        checkpoints.choose(tmp_path, critic=True)


def test_a_rank_whose_file_is_gone_is_named(tmp_path):
    checkpoint = save(tmp_path, 5, ranks=3)
    assert checkpoints.problem(checkpoint, critic=True) == ""
    (checkpoint / "critic" / "optim_world_size_3_rank_1.pt").unlink()
    assert checkpoints.problem(checkpoint, critic=True).endswith("critic lacks the file optim of rank 1")


def test_ranks_of_other_machines_are_not_missed(tmp_path):
    checkpoint = save(tmp_path, 5, ranks=4)
    for file in checkpoint.rglob("*_rank_[23].pt"):
        file.unlink()
    assert checkpoints.problem(checkpoint, critic=True) == ""


def test_if_none_is_whole_the_error_names_each_and_nothing_is_changed(folder):
    for step in (1, 2, 10):
        (folder / f"global_step_{step}" / "data.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"trainer.default_local_dir is .*global_step_10.*global_step_2.*global_step_1"
    ):
        checkpoints.choose(folder, critic=True)
    assert (folder / checkpoints.TRACKER).read_text() == "10"


def payload(file: Path) -> list[range]:
    """The bytes of a zip archive that hold what ``torch.load`` reads, the archive's own tables left out."""
    spans = []
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            with open(file, "rb") as raw:
                raw.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            start = entry.header_offset + 30 + name + extra
            spans.append(range(start, start + entry.compress_size))
    return [span for span in spans if span]


def test_no_flipped_bit_of_what_is_loaded_goes_unnoticed(folder):
    """300 bits at random; ``torch.load`` itself takes most of them."""
    draws = random.Random(0)
    file = folder / "global_step_10" / "critic" / "model_world_size_1_rank_0.pt"
    good = file.read_bytes()
    spans = payload(file)
    loaded_all_the_same = 0
    for _ in range(300):
        place = draws.choice(draws.choice(spans))
        bad = bytearray(good)
        bad[place] ^= 1 << draws.randrange(8)
        file.write_bytes(bad)
        assert "model_world_size_1_rank_0.pt" in checkpoints.problem(folder / "global_step_10", critic=True)
        try:
            torch.load(file, weights_only=True)
            loaded_all_the_same += 1
        except Exception:
            pass
    assert loaded_all_the_same > 50
    assert checkpoints.choose(folder, critic=True) == 2


def test_no_cut_goes_unnoticed(folder):
    file = folder / "global_step_10" / "actor" / "optim_world_size_1_rank_0.pt"
    good = file.read_bytes()
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        assert checkpoints.problem(folder / "global_step_10", critic=True)
        assert checkpoints.problem(folder / "global_step_10", critic=True, read=False) == ""


def test_what_is_removed(folder):
    checkpoints.remove(folder / "global_step_1", ("critic",))
    assert (folder / "global_step_1" / "data.pt").exists()
    checkpoints.remove(folder / "global_step_1", ("actor",))
    assert not (folder / "global_step_1").exists()
    assert checkpoints.saved_steps(folder) == [10, 2]
