# SPDX-License-Identifier: Apache-2.0
"""Finds the value family that ``critic.value.family`` names.

A name is one of three:

- a name given to ``register_family``,
- a module of this package, which is imported and registers its family under its own name,
- an import path such as ``my_package.module.MyFamily``.

Settings travel to Ray's workers by pickle, and the family's name inside them. Of a family outside this package the
settings carry its import path, so a worker finds it without having imported anything.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TypeVar

import verl_dvpo.families
from verl_dvpo.families.base import FamilyConfig, ValueFamily

PACKAGE = "verl_dvpo.families"

F = TypeVar("F", bound=type[ValueFamily])

_registered: dict[str, type[ValueFamily]] = {}


def register_family(name: str) -> Callable[[F], F]:
    """Registers the decorated class under ``name``.

    Raises:
        ValueError: the name has a dot, as import paths do, or another family holds it.
    """

    def register(cls: F) -> F:
        if not name.isidentifier():
            raise ValueError(f"family is {name!r}; a registered name must be an identifier")
        holder = _registered.get(name)
        if holder is not None and import_path(holder) != import_path(cls):
            raise ValueError(f"family is {name!r}; {import_path(holder)} has this name; register another one")
        _registered[name] = cls
        return cls

    return register


def family_names() -> list[str]:
    """Imports the families of this package and returns the names of all that are registered, sorted."""
    for module in pkgutil.iter_modules(verl_dvpo.families.__path__):
        importlib.import_module(f"{PACKAGE}.{module.name}")
    return sorted(_registered)


def import_path(cls: type) -> str:
    """``module.QualifiedName`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def family_class(name: str) -> type[ValueFamily]:
    """The class that ``name`` names.

    Args:
        name: a registered name, the name of a built-in family, or an import path.

    Raises:
        ValueError: there is no such family, it cannot be imported, it is no ``ValueFamily``, or it lacks a method or
            its ``Config``.
    """
    cls = _find(name)
    if not (isinstance(cls, type) and issubclass(cls, ValueFamily)):
        raise ValueError(f"family is {name!r}; it must be a subclass of {import_path(ValueFamily)}; it is {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ValueError(f"family is {name!r}; it must have every method of a ValueFamily; it lacks {missing}")
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, FamilyConfig) and is_dataclass(config)):
        raise ValueError(
            f"family is {name!r}; its attribute Config must be a dataclass that extends {import_path(FamilyConfig)}; "
            f"it is {config!r}"
        )
    return cls


def family_settings(name: str, **settings: object) -> FamilyConfig:
    """The settings of the family ``name``, checked.

    Args:
        name: as for ``family_class``.
        **settings: fields of its ``Config``; those left out keep their default.

    Raises:
        ValueError: as ``family_class``; or an unknown field, or a value outside its bounds.
    """
    cls = family_class(name)
    allowed = sorted({field.name for field in fields(cls.Config)} - {"family"})
    for field in settings:
        if field not in allowed:
            raise ValueError(f"{field} is no field of the family {name!r}; it has {', '.join(allowed)}")
    return cls.Config(family=_portable_name(name, cls), **settings)  # type: ignore[arg-type]


def build_family(settings: FamilyConfig) -> ValueFamily:
    """The family with these settings, in whichever process they are.

    Raises:
        ValueError: as ``family_class``.
    """
    return family_class(settings.family)(settings)


def _find(name: str) -> object:
    """The object that ``name`` names; a built-in family's module is imported first."""
    if not isinstance(name, str):
        raise ValueError(f"family is {name!r}; it must be a name, one of {', '.join(map(repr, family_names()))}")
    if name not in _registered and name.isidentifier() and importlib.util.find_spec(f"{PACKAGE}.{name}"):
        importlib.import_module(f"{PACKAGE}.{name}")
    if name in _registered:
        return _registered[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"family is {name!r}; it must be one of {', '.join(map(repr, family_names()))}, or an import path such as "
            "my_package.module.MyFamily"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's own may raise anything while it is imported
        raise ValueError(
            f"family is {name!r}; it must be importable here and in Ray's workers; {type(error).__name__}: {error}; "
            "install its package, or put its folder on PYTHONPATH"
        ) from error


def _portable_name(name: str, cls: type[ValueFamily]) -> str:
    """A name by which another process finds the family, which has imported nothing yet."""
    if cls.__module__.startswith(f"{PACKAGE}."):
        return name
    if cls.__module__ == "__main__" or "." in cls.__qualname__:
        raise ValueError(
            f"family is {name!r}; Ray's workers must be able to import it; it is {import_path(cls)}; "
            "move it to the top level of a module of its own"
        )
    return import_path(cls)
