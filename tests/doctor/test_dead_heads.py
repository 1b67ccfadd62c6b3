# SPDX-License-Identifier: Apache-2.0
"""Heads that are dead, twins or no numbers are found in checkpoints, of which only the head is read."""

import pytest
import torch
from planted import healthy, line_of, write

from verl_dvpo.doctor.heads import NAME
from verl_dvpo.doctor.run import diagnose, headline
from verl_dvpo.saved.head_file import save_head
from verl_dvpo.saved.manifest import Manifest, describe_files, write_manifest

HEADS, LEVELS, WIDTH = 3, 4, 8


def head(seed: int = 0) -> torch.Tensor:
    """(N·M, H) weights of three heads, drawn each on its own."""
    return torch.randn(HEADS * LEVELS, WIDTH, generator=torch.Generator().manual_seed(seed))


def save(run, step: int, weight: torch.Tensor, *, prefix: str = "score.", heads: int | None = HEADS) -> None:
    """A critic's checkpoint as the worker saves it, with a backbone that nobody needs to read."""
    folder = run / f"global_step_{step}" / "critic"
    folder.mkdir(parents=True)
    state = {"backbone.layer.weight": torch.zeros(64, 64), f"{prefix}weight": weight}
    state[f"{prefix}bias"] = torch.zeros(weight.shape[0])
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    describe(folder, "checkpoint", heads)


def describe(folder, kind: str, heads: int | None) -> None:
    settings = {} if heads is None else {"num_heads": heads}
    sizes = {"num_outputs": HEADS * LEVELS, "hidden_size": WIDTH}
    manifest = Manifest(kind=kind, family="quantile_ensemble", layout={}, settings=settings, **sizes)
    write_manifest(folder, manifest.of_files(describe_files(folder)))


@pytest.mark.parametrize("prefix", ["score.", "classifier.", "score.out."])
def test_heads_that_learn_are_in_order(tmp_path, prefix):
    write(tmp_path, healthy())
    save(tmp_path / "checkpoints", 10, head(0), prefix=prefix)
    save(tmp_path / "checkpoints", 20, head(1), prefix=prefix)
    found = line_of(tmp_path, NAME)
    assert found.state == "ok"
    assert "3 heads, all different and moving (quantile_ensemble, global_step_20)" in found.text


def test_a_dead_head_is_named_and_lives_again_when_it_is_drawn_anew(tmp_path):
    first, second = head(0), head(1)
    second[LEVELS : 2 * LEVELS] = first[LEVELS : 2 * LEVELS]  # head 1 gets no gradient
    save(tmp_path, 10, first)
    save(tmp_path, 20, second)
    found = line_of(tmp_path, NAME)
    assert found.state == "problem"
    assert "of 3 heads these have not moved since the checkpoint before: 1 (" in found.text
    assert "critic.value.head_from=seed" in found.fix
    save(tmp_path, 30, head(2))
    assert line_of(tmp_path, NAME).state == "ok"


def test_twins_are_named(tmp_path):
    weight = head()
    weight[:LEVELS] = weight[2 * LEVELS :] * (1 + 1e-7)
    save(tmp_path, 10, weight)
    found = line_of(tmp_path, NAME)
    assert (found.state, "heads 0 and 2 are the same" in found.text) == ("problem", True)
    assert "critic.value.coef.consistency" in found.fix


def test_numbers_that_are_none_are_named(tmp_path):
    weight = head()
    weight[-1, 0] = torch.inf
    save(tmp_path, 10, weight)
    found = line_of(tmp_path, NAME)
    assert (found.state, "heads 2 hold no numbers" in found.text) == ("problem", True)


def test_one_head_has_no_twin(tmp_path):
    save(tmp_path, 10, torch.ones(LEVELS, WIDTH), heads=None)
    assert line_of(tmp_path, NAME).state == "ok"


def test_checkpoints_alone_are_judged(tmp_path):
    save(tmp_path, 10, head())
    run, lines = diagnose(tmp_path)
    assert [line.name for line in lines] == [NAME]
    assert "no metrics, judged by its checkpoints alone" in headline(run)
    one_step = tmp_path / "global_step_10" / "critic"
    assert line_of(one_step, NAME).state == "ok"


def test_an_exported_critic_is_judged(tmp_path):
    save_head(tmp_path, {"weight": torch.zeros(HEADS * LEVELS, WIDTH), "bias": torch.zeros(HEADS * LEVELS)})
    describe(tmp_path, "critic", HEADS)
    found = line_of(tmp_path, NAME)
    assert (found.state, "are the same" in found.text) == ("problem", True)


def test_a_checkpoint_that_was_cut_off_is_a_warning(tmp_path):
    save(tmp_path, 10, head())
    file = tmp_path / "global_step_10" / "critic" / "model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[:200])
    found = line_of(tmp_path, NAME)
    assert found.state == "warning"
    assert file.name in found.text
