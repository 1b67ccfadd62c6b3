# SPDX-License-Identifier: Apache-2.0
"""A worker's checkpoint, exported, loaded without verl and back into a worker; and what is refused on the way."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from critic import harness
from export.reading import ids, states, worker_values

from verl_dvpo import ValueModel
from verl_dvpo.cli import main
from verl_dvpo.critic.config import DistributionalFSDPCriticConfig
from verl_dvpo.export.run import export

ROOT = Path(__file__).parents[2]

WITHOUT_VERL = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("verl", "ray", "vllm", "tensordict"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refuse())
from verl_dvpo import ValueModel
model = ValueModel.from_pretrained(sys.argv[1])
rows = model.values(json.load(sys.stdin))
print(json.dumps([{
    "mean": row.mean.tolist(), "spread": row.spread.tolist(), "quantiles": row.quantiles([0.1, 0.5, 0.9]).tolist()
} for row in rows]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def step(worker, seed=1, number=1):
    batch = harness.make_batch(seed=seed)
    harness.infer(worker, batch)
    return harness.train(worker, batch, step=number)


def saved(worker, run: Path, number: int = 1) -> Path:
    """What the trainer leaves after a step."""
    folder = run / f"global_step_{number}" / "critic"
    folder.parent.mkdir(parents=True)
    worker.note_run({"seeds": {"data.seed": 7}, "config_sha256": "0" * 64})
    worker.save_checkpoint(str(folder), global_step=number)
    (run / "latest_checkpointed_iteration.txt").write_text(str(number))
    return folder


def trained(model: str, run: Path, **settings) -> tuple:
    worker = harness.make_worker(model, **settings)
    step(worker)
    return worker, saved(worker, run)


def assert_values(rows, worker):
    for got, expected in zip(states(rows), worker_values(worker), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


FAMILIES = {
    "quantile": {},
    "two_layers": {"head_width": 8},
    "hl_gauss": {"family": "hl_gauss", "num_heads": None, "num_quantiles": None},
    "flow": {"family": "value_flow", "num_heads": None, "num_quantiles": None, "num_noises": 8, "num_frequencies": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_critic_has_the_runs_values_and_goes_back_in(family, model, tmp_path):
    worker, _ = trained(model, tmp_path / "run", value=FAMILIES[family])
    export(tmp_path / "run", tmp_path / "out")
    exported = ValueModel.from_pretrained(tmp_path / "out")
    rows = exported.values(ids(), batch_size=3)
    assert_values([row.mean for row in rows], worker)
    assert all((row.spread > 0).all() for row in rows)

    back = harness.make_worker(str(tmp_path / "out"), value=FAMILIES[family])
    for (name, a), (other, b) in zip(
        worker.engine.module.named_parameters(), back.engine.module.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(harness.full(a), harness.full(b)), name
    straight, detour = step(worker, seed=2, number=2), step(back, seed=2, number=2)
    assert straight["critic/vf_loss"] == detour["critic/vf_loss"]


def test_it_loads_in_a_process_where_importing_verl_fails(model, tmp_path):
    worker, _ = trained(model, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VERL, str(tmp_path / "out")],
        input=json.dumps(ids()), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert_values([torch.tensor(row["mean"]) for row in rows], worker)
    for row in rows:
        quantiles = torch.tensor(row["quantiles"])
        assert (quantiles.diff(dim=-1) >= 0).all()
        assert min(row["spread"]) > 0
    here = harness.full(worker.engine.module.score.weight)
    assert len(here) == 10  # 2 heads of 5 quantiles, of which each spread below is made by hand
    with torch.no_grad():
        outputs = worker.engine.module.eval()(input_ids=torch.tensor(ids()[:1])).logits[0]
    by_hand = outputs.unflatten(-1, (2, 5)).mean(-2).double().std(-1, correction=0)
    torch.testing.assert_close(torch.tensor(rows[0]["spread"]).double(), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ["merge", "keep"])
def test_adapters_are_merged_or_kept_and_the_head_is_there(adapter, model, tmp_path):
    worker = harness.make_worker(model, lora_rank=2, lora_alpha=4)
    for number in (1, 2, 3):
        step(worker, seed=number, number=number)
    saved(worker, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", adapter=adapter)
    assert (tmp_path / "out" / "adapter").exists() == (adapter == "keep")
    rows = ValueModel.from_pretrained(tmp_path / "out").values(ids())
    assert_values([row.mean for row in rows], worker)
    if adapter == "keep":
        with pytest.raises(ValueError, match="lora_adapter_path"):
            harness.make_worker(str(tmp_path / "out"))
        settings = {"lora_rank": 2, "lora_alpha": 4, "lora_adapter_path": str(tmp_path / "out" / "adapter")}
    else:
        settings = {}
    back = harness.make_worker(str(tmp_path / "out"), **settings)
    for got, expected in zip(worker_values(back), worker_values(worker), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_shards_of_two_ranks(model, tmp_path):
    port = str(harness.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(script), model, port, str(rank), str(tmp_path / "run")], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    folder = tmp_path / "run" / "global_step_1" / "critic"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"model_world_size_2_rank_0.pt", "optim_world_size_2_rank_1.pt"} <= manifest["files"].keys()
    export(tmp_path / "run", tmp_path / "out")
    rows = ValueModel.from_pretrained(tmp_path / "out").values(ids())
    expected = torch.load(tmp_path / "run" / "values.pt", weights_only=True)
    for got, row in zip(states([row.mean for row in rows]), expected, strict=True):
        torch.testing.assert_close(got, row, rtol=0, atol=1e-6)
    one = harness.make_worker(model)
    with pytest.raises(ValueError, match="was saved by 2 ranks; this run has 1"):
        one.load_checkpoint(str(folder))


OTHERS = {
    "family": (
        {"family": "value_flow", "num_heads": None, "num_quantiles": None},
        "family is 'quantile_ensemble' there",
    ),
    "sizes": ({"num_quantiles": 6}, "num_outputs is 10 there and 12 here; num_quantiles is 5 there and 6 here"),
    "levels": ({"levels": "midpoint"}, "levels is 'right' there and 'midpoint' here"),
    "width": ({"head_width": 4}, "head_width is None there and 4 here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_family_or_other_sizes_are_named_and_nothing_is_loaded(other, model, tmp_path):
    _, folder = trained(model, tmp_path / "run")
    settings, message = OTHERS[other]
    worker = harness.make_worker(model, value=settings)
    before = {name: harness.full(p).clone() for name, p in worker.engine.module.named_parameters()}
    with pytest.raises(ValueError, match=message):
        worker.load_checkpoint(str(folder))
    export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        harness.make_worker(str(tmp_path / "out"), value=settings)
    for name, parameter in worker.engine.module.named_parameters():
        assert torch.equal(before[name], harness.full(parameter))


def test_other_coefficients_load(model, tmp_path):
    _, folder = trained(model, tmp_path / "run")
    harness.make_worker(model, value={"coef": {"risk": 0.05}}).load_checkpoint(str(folder))


class Attack:
    """A pickle that would leave a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("file", ["model", "optim", "extra_state"])
def test_a_pickle_in_a_checkpoint_does_not_run(file, model, tmp_path):
    """Even where the manifest was written anew to vouch for it."""
    worker, folder = trained(model, tmp_path / "run")
    path = folder / f"{file}_world_size_1_rank_0.pt"
    content = torch.load(path, weights_only=False)
    content["more"] = Attack(tmp_path / "ran")
    torch.save(content, path)
    from verl_dvpo.saved.manifest import describe_files, read_manifest, write_manifest

    write_manifest(folder, read_manifest(folder, "checkpoint").of_files(describe_files(folder)))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        worker.load_checkpoint(str(folder))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    if file == "model":
        with pytest.raises(ValueError, match="holds no tensors alone"):
            export(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the attack is a real one


def test_a_checkpoint_that_is_not_whole_is_refused_and_named(model, tmp_path):
    worker, folder = trained(model, tmp_path / "run")
    before = worker_values(worker)
    step(worker, seed=2, number=2)
    after = worker_values(worker)
    file = folder / "optim_world_size_1_rank_0.pt"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], r"optim_world_size_1_rank_0.pt has \d+ bytes; manifest.json says"),
        (whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], "optim_world_size_1_rank_0.pt was changed"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            worker.load_checkpoint(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=r"optim_world_size_1_rank_0.pt is missing"):
        worker.load_checkpoint(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(worker_values(worker), after, strict=True))
    file.write_bytes(whole)
    (folder / "manifest.json").rename(folder / "away")
    with pytest.raises(ValueError, match=r"has no manifest\.json; it was not written to the end"):
        worker.load_checkpoint(str(folder))
    (folder / "away").rename(folder / "manifest.json")
    worker.load_checkpoint(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(worker_values(worker), before, strict=True))


def test_a_save_that_breaks_leaves_no_manifest(model, tmp_path, monkeypatch):
    worker, folder = trained(model, tmp_path / "run")
    real = torch.save

    def full_disk(content, path, *args, **kwargs):
        if "optim" in str(path):
            raise OSError(28, "No space left on device")
        return real(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        worker.save_checkpoint(str(folder), global_step=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        worker.load_checkpoint(str(folder))


def test_a_manifest_says_what_made_it_and_keeps_secrets(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    _, folder = trained(model, tmp_path / "run")
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["family"] == "quantile_ensemble"
    assert manifest["layout"] == {
        "head_width": None, "levels": "right", "num_heads": 2, "num_outputs": 10, "num_quantiles": 5,
    }  # fmt: skip
    facts = manifest["facts"]
    assert facts["seeds"] == {"data.seed": 7}
    assert facts["step"] == 1
    assert facts["versions"]["torch"] == torch.__version__
    assert {"git_revision", "platform", "config_sha256"} <= facts.keys()
    export(tmp_path / "run", tmp_path / "out")
    everything = text + "".join(
        path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")
    )
    for secret in ("hf_verysecret", str(tmp_path), os.uname().nodename, os.environ["PATH"]):
        assert secret not in everything
    assert "quantile_ensemble" in (tmp_path / "out" / "README.md").read_text()


def test_bad_runs_are_refused_and_nothing_is_written(model, tmp_path):
    _, folder = trained(model, tmp_path / "run")
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder with checkpoints"):
        export(tmp_path / "empty", out)
    with pytest.raises(ValueError, match=r"step is 9; one of \[1\] is allowed"):
        export(tmp_path / "run", out, step=9)
    with pytest.raises(ValueError, match="adapter is 'drop'"):
        export(tmp_path / "run", out, adapter="drop")
    (tmp_path / "actor_only" / "global_step_3" / "actor").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no critic"):
        export(tmp_path / "actor_only", out)
    file = folder / "manifest.json"
    whole = file.read_text()
    file.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"has the format 2; this version of verl-dvpo reads 1"):
        export(tmp_path / "run", out)
    file.write_text(whole)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    out.mkdir()
    (out / "notes").touch()
    with pytest.raises(ValueError, match="does not exist or is empty"):
        export(tmp_path / "run", out)
    assert [path.name for path in out.iterdir()] == ["notes"]


def test_an_adapter_without_base_or_head_is_refused(model, tmp_path):
    worker = harness.make_worker(model, lora_rank=2, lora_alpha=4)
    folder = saved(worker, tmp_path / "run")
    path = folder / "model_world_size_1_rank_0.pt"
    state = torch.load(path, weights_only=False)
    torch.save({name: tensor for name, tensor in state.items() if "lora_" in name}, path)
    from verl_dvpo.saved.manifest import describe_files, read_manifest, write_manifest

    write_manifest(folder, read_manifest(folder, "checkpoint").of_files(describe_files(folder)))
    with pytest.raises(ValueError, match="an adapter without its base and without a head"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["save_lora_only", "async_save"])
def test_checkpoints_that_would_lose_something_are_refused(field, model):
    worker = harness.make_worker(model)
    critic = worker.loss_fn.args[0]
    object.__setattr__(critic.checkpoint, field, True)
    with pytest.raises(ValueError, match=f"critic.checkpoint.{field} is True"):
        DistributionalFSDPCriticConfig.__post_init__(critic)


def test_megatrons_folder_of_weights_and_head(model, tmp_path):
    """The layout that the Megatron critic saves, made by hand: the worker's weights, and the head beside them."""
    worker, folder = trained(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "plain")
    target = folder / "model" / "huggingface"
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "value_head.safetensors"):
        shutil.copyfile(tmp_path / "plain" / name, target / name)
    shutil.rmtree(folder / "huggingface")
    for path in folder.glob("*.pt"):
        path.unlink()
    from verl_dvpo.saved.manifest import describe_files, read_manifest, write_manifest

    write_manifest(folder, read_manifest(folder, "checkpoint").of_files(describe_files(folder)))
    export(tmp_path / "run", tmp_path / "out")
    assert_values([row.mean for row in ValueModel.from_pretrained(tmp_path / "out").values(ids())], worker)
