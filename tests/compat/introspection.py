# SPDX-License-Identifier: Apache-2.0
"""Finds what our classes override and what our code calls by position in verl, vLLM and Ray."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import verl_dvpo

FOREIGN = ("verl", "vllm", "ray")
#: Without it, modules that build on it cannot be imported.
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
#: Written by Python for every class or every dataclass, never an override of ours.
GENERATED = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__abstractmethods__",
    "_abc_impl",
    "__parameters__",
    "__orig_bases__",
    "__firstlineno__",
    "__static_attributes__",
    "__dataclass_fields__",
    "__dataclass_params__",
    "__match_args__",
    "__eq__",
    "__hash__",
    "__repr__",
    "__replace__",
    "__wrapped__",
}


def is_foreign(module: str | None) -> bool:
    """Tells whether ``module`` belongs to verl, vLLM or Ray."""
    return (module or "").split(".")[0] in FOREIGN


def our_modules() -> Iterator[ModuleType]:
    """Imports and yields every module of the package that names one of the three packages."""
    for found in pkgutil.walk_packages(verl_dvpo.__path__, "verl_dvpo."):
        if found.name.endswith("__main__") or found.ispkg:
            continue
        spec = found.module_finder.find_spec(found.name)
        source = spec.loader.get_source(found.name)
        tree = ast.parse(source)
        imported = {
            name
            for node in ast.walk(tree)
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [each.name for each in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        if any(is_foreign(name) for name in imported) and (HAS_MEGATRON or "megatron.core" not in imported):
            yield importlib.import_module(found.name)


def our_classes() -> set[type]:
    """Collects the classes of ours with a base in verl, vLLM or Ray, those made by functions included."""
    from verl.experimental.reward_loop.reward_manager import NaiveRewardManager
    from verl.workers.engine.fsdp import transformer_impl

    from verl_dvpo.noise.manager import noisy
    from verl_dvpo.platforms.cpu.patches import without_offload

    made = [
        noisy(NaiveRewardManager),
        without_offload(transformer_impl.FSDPEngineWithLMHead),
        without_offload(transformer_impl.FSDPEngineWithValueHead),
    ]
    defined = [
        value
        for module in our_modules()
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return {each for each in [*made, *defined] if any(is_foreign(base.__module__) for base in each.__mro__)}


def is_generated(cls: type, name: str) -> bool:
    """Tells whether ``dataclass`` wrote the method, which has no source of its own."""
    code = getattr(vars(cls)[name], "__code__", None)
    return code is not None and code.co_filename == "<string>"


def is_written_in(cls: type, name: str) -> bool:
    """Tells whether the source of ``cls`` defines ``name``; Ray's stand-in of an actor class has none."""
    return name in vars(cls) and "<locals>" not in cls.__qualname__


def overridden() -> dict[str, set[str]]:
    """Maps each attribute of a foreign base that a class of ours replaces, ``module:Class.name``, to our names."""
    found: dict[str, set[str]] = {}
    for leaf in our_classes():
        order = leaf.__mro__
        for place, cls in enumerate(order):
            if is_foreign(cls.__module__) or not cls.__module__.startswith("verl_dvpo"):
                continue
            for name in vars(cls).keys() - GENERATED:
                if is_generated(cls, name):
                    continue
                owner = next((base for base in order[place + 1 :] if is_written_in(base, name)), None)
                if owner is not None and is_foreign(owner.__module__):
                    symbol = f"{owner.__module__}:{owner.__qualname__}.{name}"
                    found.setdefault(symbol, set()).add(f"{cls.__module__}:{cls.__qualname__}.{name}")
    return found


def called_by_position() -> dict[str, set[str]]:
    """Maps each function of the three packages that our code calls with a positional argument to our modules."""
    found: dict[str, set[str]] = {}
    for module in our_modules():
        tree = ast.parse(inspect.getsource(module))
        names = {**vars(module), **_imported_inside(tree)}
        for scope, call in _calls(tree):
            target = _target(call.func, names, vars(module).get(scope))
            if call.args and target is not None and (symbol := _symbol(target)) is not None:
                found.setdefault(symbol, set()).add(module.__name__)
    return found


def _imported_inside(tree: ast.Module) -> dict[str, object]:
    """Resolves what functions import for themselves."""
    return {
        name.asname or name.name: getattr(importlib.import_module(node.module), name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and is_foreign(node.module)
        for name in node.names
    }


def _calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Yields each call with the name of the top-level statement that it stands in."""
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                yield getattr(statement, "name", ""), node


def _target(function: ast.expr, names: dict[str, object], scope: object) -> object | None:
    """Resolves ``name``, ``module.name``, ``Class.name`` and ``self.name``."""
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return None
    if function.value.id == "self" and inspect.isclass(scope):
        return getattr(scope, function.attr, None)
    owner = names.get(function.value.id)
    known = inspect.ismodule(owner) or (inspect.isclass(owner) and is_foreign(owner.__module__))
    return getattr(owner, function.attr, None) if known else None


def _symbol(target: object) -> str | None:
    """Names a function written in Python, or the ``__init__`` of a class written in Python."""
    if inspect.isclass(target):
        target = target.__init__
    target = inspect.unwrap(target) if callable(target) else target
    if not inspect.isfunction(target) or not is_foreign(target.__module__) or target.__code__.co_filename == "<string>":
        return None
    return f"{target.__module__}:{target.__qualname__}"


if __name__ == "__main__":
    for symbol, ours in sorted((overridden() | called_by_position()).items()):
        print(symbol, sorted(ours))
