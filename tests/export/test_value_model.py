# SPDX-License-Identifier: Apache-2.0
"""ValueModel without a worker: texts, families, transformers alone, and folders that try something."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_base, save_critic
from transformers import AutoModelForTokenClassification, AutoTokenizer, Qwen3ForTokenClassification

from verl_dvpo import ValueModel
from verl_dvpo.families.registry import build_family, family_names, family_settings
from verl_dvpo.saved.manifest import describe_files, file_names, read_manifest, write_manifest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def critic(base: Path, tmp_path: Path) -> Path:
    return save_critic(tmp_path / "critic", base)


def vouch(folder: Path) -> None:
    """Writes the manifest anew, as someone who changed a file could."""
    manifest = read_manifest(folder, "critic")
    write_manifest(folder, manifest.of_files(describe_files(folder, set(file_names(folder)) - {"README.md"})))


def test_texts_and_their_ids_have_the_same_values_in_any_batch(critic):
    model = ValueModel.from_pretrained(critic)
    texts = ["12+34=46", "", "7", "a longer text than the others"]
    together = model.values(texts)
    assert [len(row.mean) for row in together] == [len(text) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(critic)
    for text, row in zip(texts, together, strict=True):
        (alone,) = model.values([tokenizer(text)["input_ids"]], batch_size=1)
        torch.testing.assert_close(alone.mean, row.mean, rtol=0, atol=1e-6)
        assert row.quantiles([0.1, 0.5, 0.9]).shape == (len(text), 3)
    (single,) = model.values("7")
    torch.testing.assert_close(single.mean, together[2].mean, rtol=0, atol=1e-6)


def test_a_value_depends_on_the_tokens_before_it_alone(critic):
    model = ValueModel.from_pretrained(critic)
    one, other = model.values(["12+3", "12+9"])
    assert torch.equal(one.mean[:3], other.mean[:3])
    assert one.mean[3] != other.mean[3]


@pytest.mark.parametrize("family", sorted(set(family_names()) & {
    "scalar", "scalar_ensemble", "robust_bellman", "quantile_ensemble", "gaussian", "hl_gauss", "value_flow"
}))  # fmt: skip
def test_every_family_comes_back_to_the_bit(family, base, tmp_path):
    settings = family_settings(family)
    built = ValueModel.build(base, settings)
    built.save_pretrained(tmp_path / "critic")
    loaded = ValueModel.from_pretrained(tmp_path / "critic")
    assert loaded.settings == settings
    assert loaded.tokenizer is None
    (a,), (b,) = built.values([[1, 2, 3]]), loaded.values([[1, 2, 3]])
    assert torch.equal(a.outputs, b.outputs)
    assert torch.equal(a.spread, b.spread)
    assert (a.spread > 0).all() == (family not in ("scalar", "scalar_ensemble", "robust_bellman"))


def test_transformers_alone_gives_the_outputs_of_a_linear_head(critic):
    (row,) = ValueModel.from_pretrained(critic).values([[1, 2, 3, 4]])
    plain = AutoModelForTokenClassification.from_pretrained(critic).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([[1, 2, 3, 4]])).logits[0], row.outputs, rtol=1e-6, atol=1e-7)


LINEAR = ("scalar", "scalar_ensemble", "quantile_ensemble", "gaussian", "value_flow")


@pytest.mark.parametrize("family", LINEAR)
def test_a_scalar_gives_its_value_to_each_family_that_can_take_it(family):
    """Against a plain linear layer in float64; the spread stays the one that the family draws."""
    built = build_family(family_settings(family))
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.empty(built.num_outputs, 8), torch.empty(built.num_outputs)
    built.init_head(weight, bias, generator)
    hidden = torch.randn(6, 8, generator=generator)
    value_weight, value_bias = torch.randn(8, generator=generator), torch.tensor(0.7)
    before = hidden @ weight.T + bias
    assert built.start_at(weight, bias, value_weight, value_bias)
    after = hidden @ weight.T + bias
    expected = hidden.double() @ value_weight.double() + 0.7
    torch.testing.assert_close(built.value(after).double(), expected, rtol=1e-4, atol=1e-4)
    levels = torch.tensor([0.1, 0.9])
    widths = [(built.quantiles(o, levels)[:, 1] - built.quantiles(o, levels)[:, 0]) for o in (before, after)]
    torch.testing.assert_close(widths[0], widths[1], rtol=1e-3, atol=1e-5)


def test_the_worst_case_family_starts_with_its_mean_at_the_value_and_a_histogram_refuses():
    robust = build_family(family_settings("robust_bellman", num_heads=4))
    weight, bias = torch.randn(4, 8), torch.randn(4)
    assert robust.start_at(weight, bias, torch.ones(8), torch.tensor(2.0))
    torch.testing.assert_close((torch.ones(8) @ weight.T + bias).mean(), torch.tensor(10.0))
    histogram = build_family(family_settings("hl_gauss"))
    weight = torch.randn(51, 8)
    before = weight.clone()
    assert not histogram.start_at(weight, torch.zeros(51), torch.ones(8), torch.tensor(2.0))
    assert torch.equal(before, weight)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.safetensors", "manifest.json", "config.json",
                                  "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_in_an_exported_critic_does_not_run(name, vouched, critic, tmp_path):
    torch.save({"x": Attack(tmp_path / "ran")}, critic / name)
    if vouched and name != "manifest.json":
        vouch(critic)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (a vouched file reaches transformers, which has its own)
        ValueModel.from_pretrained(critic)
    assert not (tmp_path / "ran").exists()
    if not vouched or name == "manifest.json":
        assert isinstance(caught.value, ValueError)
        assert name in str(caught.value)
    shutil.copyfile(critic / name, tmp_path / "attack.pt")
    torch.load(tmp_path / "attack.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the attack is a real one


def test_a_pickle_beside_the_weights_is_not_even_read(critic, tmp_path):
    (critic / "model.safetensors").unlink()
    torch.save({"x": Attack(tmp_path / "ran")}, critic / "pytorch_model.bin")
    vouch(critic)
    with pytest.raises(Exception):  # noqa: B017, PT011
        ValueModel.from_pretrained(critic)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_runs_only_where_asked_for(critic, tmp_path):
    config = json.loads((critic / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (critic / "config.json").write_text(json.dumps(config))
    (critic / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    vouch(critic)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ValueModel.from_pretrained(critic)
    assert not (tmp_path / "ran").exists()


def test_a_folder_names_a_family_and_imports_nothing(critic, tmp_path, monkeypatch):
    (tmp_path / "hidden_family.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = read_manifest(critic, "critic")
    object.__setattr__(manifest, "family", "hidden_family.Family")
    write_manifest(critic, manifest)
    with pytest.raises(ValueError, match=r"'hidden_family\.Family', which is not of this package"):
        ValueModel.from_pretrained(critic)
    with pytest.raises(ValueError, match=r"has 'hidden_family\.Family'; give that"):
        ValueModel.from_pretrained(critic, family="scalar")
    assert "hidden_family" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "", "a\0b"])
def test_a_manifest_cannot_name_a_file_outside(name, critic):
    manifest = read_manifest(critic, "critic")
    write_manifest(critic, manifest.of_files({**manifest.files, name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(ValueError, match="names inside the folder are allowed"):
        ValueModel.from_pretrained(critic)


def test_a_link_out_of_the_folder_is_refused(critic, tmp_path):
    shutil.copyfile(critic / "config.json", tmp_path / "outside.json")
    (critic / "config.json").unlink()
    os.symlink(tmp_path / "outside.json", critic / "config.json")
    with pytest.raises(ValueError, match="a link to elsewhere"):
        ValueModel.from_pretrained(critic)


def test_a_card_may_be_edited(critic):
    (critic / "README.md").write_text("mine")
    ValueModel.from_pretrained(critic)


def test_bad_calls_are_refused(critic, base, tmp_path):
    model = ValueModel.from_pretrained(critic)
    with pytest.raises(ValueError, match="token id 41; ids in"):
        model.values([[1, 41]])
    with pytest.raises(ValueError, match="a sequence of 65 tokens; at most 64"):
        model.values(["1" * 65])
    with pytest.raises(ValueError, match=r"numbers in \(0, 1\)"):
        model.values(["1"])[0].quantiles([0.0])
    with pytest.raises(ValueError, match="does not exist or is empty"):
        model.save_pretrained(critic)
    with pytest.raises(ValueError, match="no manifest"):
        ValueModel.from_pretrained(base)
    with pytest.raises(ValueError, match="the folder of an exported critic"):
        ValueModel.from_pretrained(tmp_path / "nowhere")
    save_critic(tmp_path / "bare", base)
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    vouch(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        ValueModel.from_pretrained(tmp_path / "bare").values("1")


def test_a_scalar_model_starts_a_new_critic(base, tmp_path):
    model = Qwen3ForTokenClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(tmp_path / "scalar")
    built = ValueModel.build(tmp_path / "scalar", family_settings("quantile_ensemble"))
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[1, 2, 3]])).logits[0, :, 0]
    torch.testing.assert_close(built.values([[1, 2, 3]])[0].mean, expected, rtol=1e-5, atol=1e-6)
