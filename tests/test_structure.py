"""Imports go down only, and in no circle (README, "Layout of the repository"); docs/formulas.md draws them, and finds each formula."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import lowrank_kernels

#: The rooms of the package, the lowest first; a module belongs to the longest name that it begins with.
ROOMS = (
    "_checks",
    "backends",
    "backends.reference",
    "backends.native",
    "backends.triton",
    "ops",
    "pairs",
    "parallel",
    "optim._shared",
    "optim",
    "diagnostics",
    "adapters",
    "explain",
    "",
)
#: Each imports the reference, and neither the other.
FLOOR = {room: height for height, room in enumerate(ROOMS)} | {"backends.native": 3, "backends.triton": 3}

ROOT = Path(lowrank_kernels.__file__).parent
#: The package's modules by name, without its own name.
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path for path in ROOT.rglob("*.py")}


def room_of(module: str) -> str:
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}." if room else "")), key=len)


def packages(module: str) -> set[str]:
    parts = module.split(".")
    return {"", *(".".join(parts[:i]) for i in range(1, len(parts)))}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """What of the package it imports, and whether while it is imported itself (not in a function, where it may wait for its turn)."""

    def found(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                assert "lowrank_kernels" not in ast.unparse(child).replace(".", " ").split(), f"{module} imports the package by name"
            if isinstance(child, ast.ImportFrom) and child.level:
                here = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
                base = ".".join(filter(None, (*here[: len(here) - child.level + 1], child.module)))
                names = (".".join(filter(None, (base, name.name))) for name in child.names)
                yield from ((name if name in MODULES else base, at_once) for name in names)
            yield from found(child, at_once and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return found(ast.parse(MODULES[module].read_text()), True)


def test_imports_go_down_only() -> None:
    rooms = {module: room_of(module) for module in MODULES}
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        for other, _ in imports(module)
        if rooms[module] != rooms[other] and FLOOR[rooms[other]] >= FLOOR[rooms[module]]
    ]
    assert not upward, "; ".join(upward)


def test_no_module_waits_for_itself() -> None:
    """Importing a module imports the packages it lies in, but for those that are under way."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        begun = {module, *packages(module)}
        at_once = [other for other, now in imports(module) if now]
        graph[module] = {*at_once, *(package for other in at_once for package in packages(other) - begun)}
    graphlib.TopologicalSorter(graph).prepare()


PAGE = (ROOT.parent / "docs" / "formulas.md").read_text(encoding="utf-8")


def test_the_drawing_is_what_is_imported() -> None:
    rooms = {"shared": "optim._shared"} | {name: f"backends.{name}" for name in ("reference", "native", "triton")}
    drawn = {(rooms.get(a, a), rooms.get(b, b)) for a, b in re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.MULTILINE)}
    real = {(room_of(module), room_of(name)) for module in MODULES for name, _ in imports(module)}
    assert drawn and drawn <= real
    below: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter({a: {b for c, b in drawn if c == a} for a, _ in drawn}).static_order():
        below[room] = {room}.union(*(below[b] for a, b in drawn if a == room))
    assert [(a, b) for a, b in real if a in below and b in below and b not in below[a]] == []


def test_formulas_are_where_the_page_says() -> None:
    places = re.findall(r"\[`([\w.]+)`\]\(\.\./([^)]+\.py)\)", PAGE)
    assert len(places) > 60
    for symbol, path in places:
        tree = ast.parse((ROOT.parent / path).read_text(encoding="utf-8"))
        for part in symbol.split("."):
            found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            assert found, f"docs/formulas.md: no {part} in {path}"
            tree = found[0]
