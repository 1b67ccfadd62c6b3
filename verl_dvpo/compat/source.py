# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of functions and classes, read from source files; nothing is imported."""

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Of a node's fields, those that say nothing about what the code does.
IGNORED = ("type_comment", "ctx", "kind")


class SymbolNotFoundError(LookupError):
    """The source tree has no such module, or the module defines no such name."""


def fingerprint(root: Path, symbol: str) -> str:
    """Hashes the source of ``symbol``; comments, docstrings and formatting do not count.

    Args:
        root: the folder that holds the top-level package, for example ``site-packages``.
        symbol: ``module:qualified.name`` of a function, class, method, or assigned or imported name.

    Returns:
        16 hexadecimal digits, equal for sources with equal syntax trees.

    Raises:
        SymbolNotFoundError: the tree lacks the module, or the module defines no such name.
    """
    module, _, name = symbol.partition(":")
    scope = list(_flat(_module(root, module).body))
    for part in name.split("."):
        found = [statement for statement in scope if part in _names(statement)]
        if not found:
            raise SymbolNotFoundError(symbol)
        scope = [inner for each in found if isinstance(each, ast.ClassDef) for inner in _flat(each.body)]
    text = "\n".join(_canonical(statement) for statement in found)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _module(root: Path, module: str) -> ast.Module:
    base = root.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.exists():
            return _parsed(file, file.stat().st_mtime_ns)
    raise SymbolNotFoundError(module)


@functools.lru_cache(maxsize=256)
def _parsed(file: Path, changed: int) -> ast.Module:
    """Parses ``file`` as it was at ``changed``."""
    return ast.parse(file.read_text(encoding="utf-8"))


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a scope, those inside ``if``, ``try`` and ``with`` included."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)


def _names(statement: ast.stmt) -> set[str]:
    """Collects the names that a statement binds in its scope."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _canonical(node: object) -> str:
    """Writes a syntax tree out, the same under every version of Python: absent and empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(each) for each in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = _without_docstring(value)
        if name not in IGNORED and value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body
