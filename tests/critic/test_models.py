# SPDX-License-Identifier: Apache-2.0
"""Critics on several architectures: two updates of the real worker (FSDP2) against transformers alone, in float64."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel
from verl.workers.utils.padding import response_from_nested

from critic import harness, images, models, plain
from verl_dvpo.critic.head import BackboneWithHead, load_backbone

TEXT = [name for name in models.MODELS if "_vl" not in name]


def test_fsdp2_can_find_what_a_head_on_a_bare_backbone_returns(tmp_path: Path):
    """It looks for tensors with pytree; where it finds none, weights are not gathered again for the way back."""
    backbone = AutoModel.from_pretrained(models.save(tmp_path / "gemma3", "gemma3"))
    output = BackboneWithHead(backbone)(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    (found,) = tree_leaves(output)
    assert found is output.logits


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path):
    """Else transformers would make them up, and say so in a warning."""
    for name in ("llama", "gemma3"):
        folder = Path(models.save(tmp_path / name, name))
        tensors = load_file(folder / "model.safetensors")
        lost = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
        del tensors[lost]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = AutoConfig.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"lack 1 of the backbone's weights, the first .*1\.mlp\.up_proj"):
            load_backbone(str(folder), config, dtype=torch.float32, trust_remote_code=False)


class Originals:
    """The forward functions of transformers' classes, which verl replaces for vision-language models."""

    def __init__(self, name: str) -> None:
        module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
        classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, nn.Module)]
        self.kept = [(each, key, value) for each in classes for key, value in vars(each).items() if callable(value)]

    @contextlib.contextmanager
    def back(self) -> Iterator[None]:
        """Puts them in place for a while."""
        replaced = [(each, key, vars(each)[key]) for each, key, _ in self.kept]
        self.put(self.kept)
        yield
        self.put(replaced)

    @staticmethod
    def put(functions: list[tuple[type, str, Any]]) -> None:
        for each, key, value in functions:
            if vars(each)[key] is not value:
                setattr(each, key, value)


def check_two_updates(
    path: str, batch: Any, forward: plain.Forward | None = None, originals: Originals | None = None, **settings: Any
) -> None:
    """Values and gradients of both updates, and what moved."""
    backbone = plain.backbone_of(path)
    worker = harness.make_worker(path, value=plain.VALUE, **settings)
    captured = harness.capture_gradients(worker)
    seen = []
    for step in (1, 2):
        before = {name: harness.full(p).detach().clone() for name, p in worker.engine.module.named_parameters()}
        if step == 2:  # from here on the plain model reads what the worker learned, not the disk
            learned = {name.removeprefix("model."): p for name, p in before.items() if name.startswith("model.")}
            backbone.load_state_dict(learned, strict=False)
        head = plain.head_of(worker)
        with originals.back() if originals else contextlib.nullcontext():
            expected = plain.values_of(plain.states_of(backbone, head, batch, forward))
            gradients = plain.gradients_of(backbone, head, batch, forward)

        values = response_from_nested(harness.infer(worker, batch)["values"], batch["response_mask"])
        for got, want in zip(values.unbind(), expected, strict=True):
            torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
        metrics = harness.train(worker, batch, step=step)
        numbers = torch.tensor([float(n) for each in metrics.values() for n in torch.tensor(each).flatten()])
        assert torch.isfinite(numbers).all(), metrics

        scale = max(gradient.abs().max().item() for gradient in gradients.values())
        assert scale > 1e-4
        assert gradients.keys() <= captured.keys()
        for name, got in captured.items():
            want = gradients.get(name, torch.zeros_like(got, dtype=torch.float64))
            torch.testing.assert_close(
                got.double(), want, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        after = dict(worker.engine.module.named_parameters())
        still = {name for name, tensor in before.items() if torch.equal(tensor, harness.full(after[name]))}
        assert not still & {name for name, gradient in captured.items() if gradient.any()}
        seen.append((values.values().clone(), {name: gradient.clone() for name, gradient in captured.items()}))
    (first, gradients), (second, others) = seen
    assert (first - second).abs().max() > 1e-4
    assert any(not torch.allclose(gradient, others[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("name", TEXT)
def test_two_updates_on_text(name, tmp_path: Path):
    # transformers' sdpa leaves Gemma 2's bound on attention scores out.
    settings = {"override_config": {"attn_implementation": "eager"}} if name == "gemma2" else {}
    check_two_updates(models.save(tmp_path / name, name), harness.make_batch(), **settings)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_two_updates_padded_with_a_window(name, tmp_path: Path):
    check_two_updates(models.save(tmp_path / name, name), harness.make_batch(), use_remove_padding=False)


@pytest.fixture
def originals(request: pytest.FixtureRequest) -> Iterator[Originals]:
    """Puts verl's replacements out of the way of the tests after this one."""
    name = request.param
    getattr(transformers, models.MODELS[name][1])
    kept = Originals(name)
    yield kept
    kept.put(kept.kept)


CASES = {
    "text_only": ("qwen3_vl", "text", True),
    "images": ("qwen3_vl", "images", True),
    "images_padded": ("qwen3_vl", "images", False),
    "some_images": ("qwen3_vl", "some", True),
    # Packed, verl hands Qwen2.5-VL's attention to flash-attention, which needs a GPU.
    "qwen2_5_vl_padded": ("qwen2_5_vl", "images", False),
}


@pytest.mark.parametrize(("originals", "kind", "packed"), CASES.values(), ids=CASES, indirect=["originals"])
def test_two_updates_of_a_vision_language_model(originals, kind, packed, tmp_path: Path, request):
    name = CASES[request.node.callspec.id][0]
    batch = harness.make_batch()
    if kind != "text":
        batch = images.add_images(batch, without=(1, 4, 5) if kind == "some" else ())
    forward = images.forward_of(batch) if kind != "text" else None
    path = models.save(tmp_path / name, name)
    check_two_updates(path, batch, forward, originals, use_remove_padding=packed)
