# SPDX-License-Identifier: Apache-2.0
"""A family is found by name or import path; one that cannot be used is named."""

import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from verl_dvpo.critic.config import checked_family, family_config
from verl_dvpo.families.base import FamilyLoss
from verl_dvpo.families.registry import family_class, family_names, import_path, register_family
from verl_dvpo.families.scalar import ScalarConfig, ScalarFamily

OUTSIDE = """
from dataclasses import dataclass

from verl_dvpo.families.base import FamilyConfig
from verl_dvpo.families.registry import register_family
from verl_dvpo.families.scalar import ScalarConfig, ScalarFamily


@dataclass(frozen=True, kw_only=True)
class ShiftedConfig(ScalarConfig):
    shift: float = 1.0


@register_family("test_shifted")
class Shifted(ScalarFamily):
    Config = ShiftedConfig

    def __init__(self, config):
        super().__init__(config)
        self.shift = config.shift


class Abstract(__import__("verl_dvpo.families.base", fromlist=["x"]).ValueFamily):
    Config = ScalarConfig

    def value(self, outputs):
        return outputs[..., 0]


class Plain:
    pass


class Unsettled(ScalarFamily):
    Config = dict
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that is not ours, on sys.path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "test_outside_family.py").write_text(OUTSIDE)
    (folder / "test_outside_broken.py").write_text("raise RuntimeError('no luck today')\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_the_package_has_its_families():
    assert {"scalar", "scalar_ensemble", "robust_bellman", "quantile_ensemble", "value_flow"} <= set(family_names())
    assert family_class("scalar") is ScalarFamily


def test_a_family_of_another_package_is_found_by_its_path_and_by_its_name_afterwards(outside):
    settings = family_config("test_outside_family.Shifted", shift=2.5, cliprange=0.1)
    assert checked_family(settings).shift == 2.5
    assert family_class("test_shifted") is type(checked_family(settings))
    # By its registered name too the settings carry the path: a worker has registered nothing.
    assert family_config("test_shifted").family == "test_outside_family.Shifted"


def test_a_worker_that_has_imported_nothing_finds_it(outside):
    code = textwrap.dedent("""
        import pickle, sys
        from verl_dvpo.families.registry import build_family
        print(build_family(pickle.load(sys.stdin.buffer)).shift)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(family_config("test_outside_family.Shifted", shift=4.0)),
        capture_output=True,
        check=True,
        env={"PYTHONPATH": f"{outside}:{Path(__file__).parents[2]}"},
    )
    assert float(done.stdout) == 4.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("normal", ["'normal'", "'quantile_ensemble'", "my_package.module.MyFamily"]),
        ("bounds", ["'bounds'", "'scalar'"]),
        (None, ["None", "'scalar'"]),
        ("no_such_package.Family", ["No module named 'no_such_package'", "PYTHONPATH"]),
        ("test_outside_family.Missing", ["has no attribute 'Missing'"]),
        ("test_outside_broken.Family", ["RuntimeError: no luck today"]),
        ("test_outside_family.Plain", ["must be a subclass of verl_dvpo.families.base.ValueFamily"]),
        ("test_outside_family.ShiftedConfig", ["must be a subclass of verl_dvpo.families.base.ValueFamily"]),
        ("test_outside_family.Abstract", ["it lacks __init__, build_targets, keep, loss, quantiles, values_from_kept"]),
        ("test_outside_family.Unsettled", ["its attribute Config must be a dataclass", "<class 'dict'>"]),
    ],
)
def test_a_family_that_cannot_be_used_is_named(outside, name, words):
    with pytest.raises(ValueError, match=r"^critic\.value\.family is ") as error:
        family_config(name)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_field_is_named_with_those_there_are():
    with pytest.raises(
        ValueError, match=re.escape("critic.value.quantiles is no field of the family 'scalar'; it has")
    ):
        family_config("scalar", quantiles=5)


def test_two_families_cannot_have_one_name():
    class Other(ScalarFamily):
        pass

    with pytest.raises(ValueError, match=r"'scalar'; verl_dvpo\.families\.scalar\.ScalarFamily has this name"):
        register_family("scalar")(Other)
    with pytest.raises(ValueError, match=r"'a\.b'; a registered name must be an identifier"):
        register_family("a.b")(Other)
    assert family_class("scalar") is ScalarFamily


def test_a_family_that_workers_cannot_import_is_refused():
    @register_family("test_local")
    class Local(ScalarFamily):
        pass

    with pytest.raises(ValueError, match=r"'test_local'; Ray's workers must be able to import it"):
        family_config("test_local")
    assert "<locals>" in import_path(Local)


class _Broken(ScalarFamily):
    """A scalar family one of whose methods does something else."""

    def __init__(self, **methods) -> None:
        super().__init__(ScalarConfig())
        for name, method in methods.items():
            setattr(self, name, method)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"num_outputs": 0}, "its num_outputs must be an integer >= 1, not 0"),
        ({"value": lambda outputs: outputs}, "value(outputs) must return (2, 3), not (2, 3, 1)"),
        ({"value": lambda outputs: outputs[..., 0] + 1}, "value(outputs) must equal values_from_kept(keep(outputs))"),
        ({"value": lambda outputs: outputs[..., 0] / 0}, "value(outputs) must be finite"),
        ({"value": lambda outputs: 1.0}, "value(outputs) must return a tensor (2, 3), not float"),
        (
            {"quantiles": lambda outputs, levels: outputs},
            "quantiles(outputs, levels) must return (2, 3, 3), not (2, 3, 1)",
        ),
        ({"quantiles": lambda outputs, levels: outputs - levels}, "quantiles must ascend with the level"),
        (
            {"head_values": lambda outputs: outputs[..., 0]},
            "head_values(outputs) must return (2, 3, heads), not (2, 3)",
        ),
        ({"keep": lambda outputs: outputs[..., 0]}, "keep(outputs) must return (2, 3, 1), not (2, 3)"),
        ({"values_from_kept": lambda kept: kept}, "values_from_kept(kept) must return (2, 3), not (2, 3, 1)"),
        ({"build_targets": lambda *a, **k: {}}, "build_targets must return at least one tensor"),
        ({"build_targets": lambda *a, **k: None}, "build_targets must return names with tensors, not NoneType"),
        (
            {"build_targets": lambda kept, rewards, mask, **k: {"returns": rewards.flatten()}},
            "build_targets()['returns'] must return (2, 3, ...), not (6,)",
        ),
        ({"build_targets": lambda kept, rewards, mask: {}}, "its build_targets must work on a batch of 2 sequences"),
        ({"multipliers": lambda targets, mask: {"m": mask}}, "multipliers()['m'] must return (), not (6,)"),
        ({"loss": lambda outputs, *a: outputs.sum()}, "loss must return a FamilyLoss, not Tensor"),
        (
            {"loss": lambda outputs, *a: FamilyLoss(total=outputs.mean(), terms={})},
            "loss(...).total must return (6,), not ()",
        ),
        (
            {"loss": lambda outputs, *a: FamilyLoss(total=outputs[:, 0], terms={"x": outputs})},
            "loss(...).terms['x'] must return (6,), not (6, 1)",
        ),
        (
            {"loss": lambda outputs, *a: FamilyLoss(total=outputs[:, 0].detach(), terms={})},
            "loss(...).total must carry a gradient",
        ),
        ({"statistics": lambda outputs: {"s": outputs}}, "statistics()['s'] must return (6,), not (6, 1)"),
        (
            {"target_statistics": lambda targets: {"s": targets["returns"]}},
            "target_statistics()['s'] must return (6,), not (6, 1)",
        ),
        ({"init_head": lambda weight, bias, generator: None}, "init_head must fill weight and bias"),
        ({"warnings": lambda statistics, reward_std: statistics["x"]}, "its warnings must work on a batch"),
    ],
)
def test_a_wrong_shape_is_named(methods, message):
    from verl_dvpo.families.check import check_family

    check_family(_Broken())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_family(_Broken(**methods), "mine")
    assert str(error.value).startswith("family is 'mine'; ")


def test_the_check_leaves_torchs_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    checked_family(family_config("value_flow"))
    assert torch.equal(torch.rand(2), expected)
