"""Imports go one way: down the order of packages, without rings, and none hides in a function to dodge one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import ROOT

#: a package may import from those before it
ORDER = [
    "errors",
    "utils",
    "families",
    "spec",
    "modeling",
    "cost",
    "criteria",
    "plan",
    "surgery",
    "compensate",
    "peft",
    "pruning",
    "family_check",
    "latency",
    "losses",
    "methods",
    "training",
    "evaluation",
    "publish",
    "contrib",
]
PACKAGE, CLI = "hf_vitprune", "hf_vitprune_cli"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package and of the command line."""
    found = {}
    for path in sorted(path for package in (PACKAGE, CLI) for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def for_types(tree: ast.Module) -> set[int]:
    """Statements that only type checkers run."""
    blocks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def imports(name: str, path: Path, known: dict[str, Path], types: bool) -> Iterator[tuple[str, int]]:
    """(module, line) for every import statement of a file, inside functions too, and every import by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = set() if types else for_types(tree)
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if inner in known else module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((arg.value, node.lineno) for arg in node.args if isinstance(arg, ast.Constant))


def graph(root: Path = ROOT, types: bool = True) -> dict[str, dict[str, int]]:
    """Module -> modules of ours that it imports, with the line; ``types``: those for type checkers, too."""
    known = modules(root)
    found = {name: dict(imports(name, path, known, types)) for name, path in known.items()}
    return {
        name: {target: line for target, line in targets.items() if target.split(".")[0] in (PACKAGE, CLI)}
        for name, targets in found.items()
    }


def rank(module: str) -> int:
    """Place of a module's package in the order; the public names come after them, and the command line last."""
    top, package = (module.split(".") + [""])[:2]
    if top == CLI:
        return len(ORDER) + 1
    return ORDER.index(package) if package else len(ORDER)


def upward(edges: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{name}:{line} imports {target}"
        for name, targets in edges.items()
        for target, line in targets.items()
        if rank(target) > rank(name)
    ]


def ring(edges: dict[str, dict[str, int]]) -> list[str]:
    """Modules that import each other in a circle, the first found; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in edges.get(name, {}):
            found = visit(target, [*trail, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def test_every_package_has_its_place() -> None:
    assert {name.split(".")[1] for name in modules() if name.startswith(f"{PACKAGE}.")} <= set(ORDER)


def test_no_import_goes_up() -> None:
    assert upward(graph()) == []


def test_no_ring() -> None:
    assert ring(graph(types=False)) == []


def test_the_table_of_packages_has_this_order() -> None:
    rows = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*ORDER, CLI]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (
            "def f():\n    from ..publish.card import model_card\n",
            "hf_vitprune.spec.bad:2 imports hf_vitprune.publish.card",
        ),
        ("from hf_vitprune import publish\n", "hf_vitprune.spec.bad:1 imports hf_vitprune.publish"),
        ("import hf_vitprune\n", "hf_vitprune.spec.bad:1 imports hf_vitprune"),
        (
            "importlib.import_module('hf_vitprune_cli.app')\n",
            "hf_vitprune.spec.bad:1 imports hf_vitprune_cli.app",
        ),
        ("from ..errors import VitPruneError\n", ""),
    ],
)
def test_what_goes_up_is_found(source: str, wrong: str, tmp_path: Path) -> None:
    files = {"spec/bad.py": source, "publish/card.py": "", "errors.py": "", "../hf_vitprune_cli/app.py": ""}
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        for folder in (path.parent, tmp_path / PACKAGE):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        path.write_text(text)
    assert upward(graph(tmp_path)) == ([wrong] if wrong else [])


def test_a_ring_is_found() -> None:
    assert ring({"a": {"b": 1}, "b": {"c": 1, "d": 1}, "c": {}, "d": {"b": 1}}) == ["b", "d", "b"]
