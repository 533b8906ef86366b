"""The house: imports run downward, nothing imports in a circle, and the engine room has one door."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "semeda_fast"
TOOLS = {"semeda_fast.kernels.aot", "semeda_fast.kernels.bench", "semeda_fast.kernels.model"}  # run by hand, on top

# From the ground up; a file imports from its own floor (within a folder) and from those below.
FLOORS = (
    ("errors", "files", "warn", "plain", "advice", "capture", "schedule", "installation", "defaults"),
    ("options",),
    ("spec", "folding"),
    ("shapes",),
    ("checks",),
    ("backends", "kernels"),
    ("proxy", "metrics"),
    ("counts",),
    ("functional",),
    ("loss", "inspection"),
    ("outputs",),
    ("integrations",),
    ("pickles",),
    ("",),
    ("cli",),
)
ENGINE = {"backends", "kernels"}  # the backend triton launches kernels/, whose plans read the backends' records
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package with kernels/ where it is installed."""
    found = {}
    for folder, package in ((PACKAGE, "semeda_fast"), (ROOT / "kernels", "semeda_fast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@functools.cache
def bound(path: Path) -> set[str]:
    """The names that a file binds by `from module import name`."""
    taken = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module)
    return {alias.asname or alias.name for node in taken for alias in node.names}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports, wherever in it: at the top, in a function, for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` takes something of the package's own, or else a module of that name.
            own = bound(known[base]) if base in known else set()
            found |= {
                base if a.name in own or f"{base}.{a.name}" not in known else f"{base}.{a.name}" for a in node.names
            }
    return {module for module in found if module in known and module != name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or []."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    for name in arrows:
        if found := walk(name, []):
            return found
    return []


def room(module: str) -> str:
    """The part of the package that a module belongs to: its first folder or file."""
    return module.removeprefix("semeda_fast").lstrip(".").partition(".")[0]


def test_nothing_imports_in_a_circle() -> None:
    assert circle(graph()) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_imports_run_downward() -> None:
    upward = [
        f"{name} -> {other}"
        for name, others in graph().items()
        if name not in TOOLS
        for other in others
        if FLOOR[room(other)] > FLOOR[room(name)]
        or (
            FLOOR[room(other)] == FLOOR[room(name)] and room(other) != room(name) and {room(name), room(other)} - ENGINE
        )
    ]
    assert upward == []


def test_the_engine_room_has_one_door() -> None:
    """Above it, what is behind semeda_fast.backends is taken from there."""
    above = FLOOR["backends"] + 1
    past = [
        f"{name} -> {other}"
        for name, others in graph().items()
        if FLOOR[room(name)] >= above
        for other in others
        if other.startswith("semeda_fast.backends.")
    ]
    assert past == []
