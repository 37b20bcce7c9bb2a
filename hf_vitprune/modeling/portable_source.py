"""The one file of a portable folder, put together from the source of this package: no second copy is written by hand.

Classes and functions are taken whole, with what they need in turn; nothing is taken that a folder does not need.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

#: a file stays readable for those who are to trust it
MOST_LINES = 400
_PACKAGE = __name__.partition(".")[0]


class Definition(NamedTuple):
    """A class, function or constant of one module: its text, the names it uses, and those in its annotations."""

    text: str
    names: frozenset[str]
    hints: frozenset[str]


class Module(NamedTuple):
    """Definitions of a module by name, and its imports: name here -> (module, name there; None for a module)."""

    definitions: dict[str, Definition]
    imports: dict[str, tuple[str, str | None]]


def assemble(needed: dict[str, str], header: str, footer: str, imports: dict[str, set[str]]) -> str:
    """Source of a module with some parts of this package and all that they need.

    Args:
        needed: name -> module of this package.
        header: its docstring.
        footer: what comes last; it needs ``imports`` from elsewhere: module -> names.
    """
    body: dict[tuple[str, str], str] = {}
    outside = {(module, name) for module, names in imports.items() for name in names}
    for name, module in needed.items():
        _collect(name, module, body, outside)
    taken = [name for _, name in body]
    doubled = {name for name in taken if taken.count(name) > 1}
    assert not doubled, f"two parts are called {doubled}"
    lines = ["from __future__ import annotations", "", *_import_lines(outside)]
    text = "\n".join([f'"""{header}"""', "", *lines, ""])
    for part in body.values():
        text += f"\n{part}\n"
    return text + "\n" + footer


def _collect(name: str, module: str, body: dict[tuple[str, str], str], outside: set[tuple[str, str]]) -> None:
    """Add a definition behind those that it needs."""
    source = _read(module)
    if (module, name) in body:
        return
    if name not in source.definitions:
        _import(name, source.imports[name], body, outside)
        return
    definition = source.definitions[name]
    body[module, name] = ""  # its place is behind what it needs; those that need each other find it taken
    for used in sorted(definition.names):
        if used in source.definitions and used != name:
            _collect(used, module, body, outside)
        elif used in source.imports:
            _import(used, source.imports[used], body, outside)
    for hint in definition.hints & source.imports.keys():
        if source.imports[hint][0].partition(".")[0] != _PACKAGE:  # never evaluated, and so not needed, but read
            _import(hint, source.imports[hint], body, outside)
    del body[module, name]
    body[module, name] = definition.text


def _import(
    name: str, origin: tuple[str, str | None], body: dict[tuple[str, str], str], outside: set[tuple[str, str]]
) -> None:
    """Take in what is imported: a definition of this package, or (module, name) and (statement, "") from outside."""
    module, there = origin
    if module.partition(".")[0] == _PACKAGE:
        _collect(there or name, module, body, outside)
    elif there is None:
        outside.add((f"import {module}" if name == module else f"import {module} as {name}", ""))
    else:
        outside.add((module, there))


def _import_lines(outside: set[tuple[str, str]]) -> list[str]:
    modules = sorted({module for module, name in outside if name})
    lines = [statement for statement, name in outside if not name]
    lines += [f"from {module} import {', '.join(sorted(n for m, n in outside if m == module))}" for module in modules]
    own = ("torch", "transformers")  # behind the standard library
    return sorted(lines, key=lambda line: (line.split()[1].partition(".")[0] in own, line.split()[1], line))


@functools.cache
def _read(module: str) -> Module:
    """What a module of this package defines and imports."""
    source = inspect.getsource(importlib.import_module(module))
    lines = source.splitlines()
    definitions: dict[str, Definition] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            definitions[node.name] = _definition(node, lines)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                definitions[target.id] = _definition(node, lines)
    return Module(definitions, imports)


def _definition(node: Any, lines: list[str]) -> Definition:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    used, hints = set(_names(node)), {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    return Definition(_brief(node, lines, first), frozenset(used), frozenset(hints - used))


def _brief(node: ast.AST, lines: list[str], first: int) -> str:
    """Its text, with no more than the first line of every docstring: the rest is for those who call it from here."""
    kept = dict(enumerate(lines[first : node.end_lineno], first))  # type: ignore[attr-defined]
    for inner in ast.walk(node):
        if not isinstance(inner, (ast.ClassDef, ast.FunctionDef)) or ast.get_docstring(inner) is None:
            continue
        text = inner.body[0]
        if text.lineno != text.end_lineno:
            kept[text.lineno - 1] += '"""'
            for gone in range(text.lineno, text.end_lineno or 0):
                del kept[gone]
    return "\n".join(re.sub(r"  # type: ignore\S*( .*)?$", "", line) for line in kept.values())


def _names(node: ast.AST) -> Iterator[str]:
    """Names that running a definition needs: all but those in annotations, which are never evaluated."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _names(child)
    if isinstance(node, ast.Name):
        yield node.id
