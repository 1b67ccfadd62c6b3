# SPDX-License-Identifier: Apache-2.0
"""Tries a family on a tiny ragged batch, so that a wrong shape is named before training starts.

Shape legend: B = 2 sequences, T = 3 positions, L = B·T tokens, H = 4 hidden units, J = 3 quantile levels.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from verl_dvpo.families.base import FamilyLoss, ValueFamily
from verl_dvpo.families.registry import import_path

B, T, H = 2, 3, 4
LEVELS = (0.25, 0.5, 0.75)
#: A token that the policy did not write between two that it did, and a row of padding.
MASK = ((1, 0, 1), (0, 0, 0))


def check_family(family: ValueFamily, name: str | None = None) -> None:
    """Calls every method of ``family`` once, as the worker does. Takes milliseconds; torch's own seed stays as it was.

    Args:
        family: any value family.
        name: how errors call it; its import path by default.

    Raises:
        ValueError: a method raises, or returns another type or shape than ``ValueFamily`` says, or values or losses
            that are not finite, quantiles that do not ascend, or a loss without a gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _Trial(family, name or import_path(type(family))).run()


class _Trial:
    """One run through a family's methods."""

    def __init__(self, family: ValueFamily, name: str) -> None:
        self.family = family
        self.name = name

    def run(self) -> None:
        for count in ("num_outputs", "num_kept"):
            value = getattr(self.family, count, None)
            self.require(isinstance(value, int) and value >= 1, f"its {count} must be an integer >= 1", value)
        outputs = self.outputs()
        kept = self.check_values(outputs)
        targets = self.check_targets(kept)
        self.check_loss(outputs.flatten(0, 1), targets)
        self.check_statistics(outputs.flatten(0, 1), targets)

    def outputs(self) -> Tensor:
        """(B, T, D) of a freshly drawn head on random hidden states."""
        weight, bias = torch.empty(self.family.num_outputs, H), torch.empty(self.family.num_outputs)
        weight.fill_(torch.nan), bias.fill_(torch.nan)
        self.call("init_head", weight, bias, torch.Generator().manual_seed(0))
        filled = bool(weight.isfinite().all() and bias.isfinite().all())
        self.require(filled, "init_head must fill weight and bias with finite numbers", "NaN or infinity")
        return torch.randn(B, T, H) @ weight.T + bias

    def check_values(self, outputs: Tensor) -> Tensor:
        """Returns what the family keeps of (B, T, D) outputs."""
        value = self.tensor("value(outputs)", self.call("value", outputs), (B, T))
        kept = self.tensor("keep(outputs)", self.call("keep", outputs), (B, T, self.family.num_kept))
        seen = self.tensor("values_from_kept(kept)", self.call("values_from_kept", kept), (B, T))
        apart = float((value - seen).abs().max())
        close = apart <= 1e-4 * max(1.0, float(seen.abs().max()))
        self.require(close, "value(outputs) must equal values_from_kept(keep(outputs))", f"differ by {apart:.3g}")
        heads = self.tensor("head_values(outputs)", self.call("head_values", outputs), (B, T, ...))
        self.require(heads.ndim == 3, f"head_values(outputs) must return ({B}, {T}, heads)", tuple(heads.shape))
        found = self.call("quantiles", outputs, torch.tensor(LEVELS))
        quantiles = self.tensor("quantiles(outputs, levels)", found, (B, T, len(LEVELS)))
        self.require(bool((quantiles.diff() >= 0).all()), "quantiles must ascend with the level", "descend")
        return kept

    def check_targets(self, kept: Tensor) -> dict[str, Tensor]:
        """Returns the targets of the batch, flattened to (L, ...)."""
        rewards = torch.zeros(B, T)
        rewards[0, -1] = 1.0
        generator = torch.Generator().manual_seed(0)
        built = self.call("build_targets", kept, rewards, torch.tensor(MASK), gamma=0.9, lam=0.95, generator=generator)
        names = self.names("build_targets", built)
        self.require(bool(names), "build_targets must return at least one tensor", "none")
        return {n: self.tensor(f"build_targets()[{n!r}]", built[n], (B, T, ...)).flatten(0, 1) for n in names}

    def check_loss(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        mask = torch.tensor(MASK).flatten()
        multipliers = self.call("multipliers", targets, mask)
        for name in self.names("multipliers", multipliers):
            self.tensor(f"multipliers()[{name!r}]", multipliers[name], ())
        leaf = outputs.detach().requires_grad_()
        loss = self.call("loss", leaf, targets, multipliers)
        self.require(isinstance(loss, FamilyLoss), "loss must return a FamilyLoss", type(loss).__name__)
        self.tensor("loss(...).total", loss.total, (B * T,))
        for name in self.names("loss(...).terms", loss.terms):
            self.tensor(f"loss(...).terms[{name!r}]", loss.terms[name], (B * T,))
        summed = sum((c * loss.terms[n] for n, c in loss.coef.items() if n in loss.terms), torch.zeros(B * T))
        known = set(loss.coef) <= set(loss.terms)
        exact = not loss.coef or bool(torch.allclose(summed, loss.total, rtol=1e-4, atol=1e-5))
        self.require(known and exact, "loss(...).total must be the sum of coef times terms", dict(loss.coef))
        self.require(loss.total.requires_grad, "loss(...).total must carry a gradient", "be without one")
        (gradient,) = torch.autograd.grad(loss.total.sum(), leaf, allow_unused=True)
        finite = gradient is not None and bool(gradient.isfinite().all())
        self.require(finite, "the gradient of loss(...).total must be finite", "none, NaN or infinity")

    def check_statistics(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        means: dict[str, float] = {}
        for method, argument in (("statistics", outputs), ("target_statistics", targets)):
            found = self.call(method, argument)
            for name in self.names(method, found):
                means[name] = float(self.tensor(f"{method}()[{name!r}]", found[name], (B * T,)).mean())
        self.names("warnings", self.call("warnings", means, 1.0))

    def call(self, method: str, *arguments: object, **named: object) -> Any:
        try:
            return getattr(self.family, method)(*arguments, **named)
        except Exception as error:  # code of the user's own may raise anything
            raise ValueError(
                f"family is {self.name!r}; its {method} must work on a batch of {B} sequences of {T} tokens; it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def names(self, what: str, found: object) -> Iterable[str]:
        self.require(isinstance(found, Mapping), f"{what} must return names with tensors", type(found).__name__)
        assert isinstance(found, Mapping)
        return list(found)

    def tensor(self, what: str, found: object, shape: tuple[Any, ...]) -> Tensor:
        """Returns ``found`` if it is a finite tensor of that shape, in which ``...`` stands for any rest."""
        rest = shape[-1:] == (...,)
        wanted = shape[:-1] if rest else shape
        shown = str(wanted)[:-1] + ", ...)" if rest else str(wanted)
        self.require(isinstance(found, Tensor), f"{what} must return a tensor {shown}", type(found).__name__)
        assert isinstance(found, Tensor)
        fits = tuple(found.shape[: len(wanted)] if rest else found.shape) == wanted
        self.require(fits, f"{what} must return {shown}", tuple(found.shape))
        self.require(bool(found.isfinite().all()), f"{what} must be finite", "NaN or infinity")
        return found

    def require(self, fits: bool, allowed: str, found: object) -> None:
        if not fits:
            raise ValueError(f"family is {self.name!r}; {allowed}, not {found}")
