"""The import rule of docs/architecture.md: every room imports only rooms below it, and no circle."""

from __future__ import annotations

import ast
import copy
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparc_kernels"
BELOW_TRAIN = ("core", "launch", "ops", "nn", "distributed", "io")
# a room -> the rooms that it may import, its own aside; the files at the top are below all but `core`
ROOMS = {
    "core": (),
    "reference": (),
    "metrics": ("core",),
    "data": ("core",),
    "launch": ("core",),
    "ops": ("core", "launch"),
    "nn": ("core", "launch", "ops"),
    "distributed": ("core", "launch", "ops", "nn"),
    "io": ("core", "launch", "ops", "nn", "distributed"),
    "checkpoint": ("io",),
    "train": BELOW_TRAIN,
    "evaluation": (*BELOW_TRAIN, "metrics"),
    "tools": (*BELOW_TRAIN, "train", "evaluation", "reference", "metrics", "data"),
    "cli": (*BELOW_TRAIN, "train", "evaluation", "reference", "metrics", "data", "tools"),
    "": ("nn", "ops", "reference", "metrics", "data"),  # what `import sparc_kernels` offers
    "__main__": ("cli",),
}


def modules(folder: Path) -> dict[str, Path]:
    """Every module below a folder by its dotted name."""
    named = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(name: str, path: Path, named: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, at its top or in a function; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and name != "sparc_kernels":
            node.body = [ast.Pass()]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                targets.add(f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in named else origin)
    return {target for target in targets if target in named and target != name}


def room(name: str) -> str:
    return [*name.split("."), ""][1]


def against_the_rule(graph: dict[str, set[str]]) -> list[str]:
    """Arrows that point up or sideways. The version, at the top, is everyone's."""
    wrong = []
    for name, targets in graph.items():
        for target in targets:
            allowed = (*ROOMS[room(name)], room(name), *([""] if name != "sparc_kernels" else []))
            if room(target) not in allowed:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle, or nothing. `sparc_kernels` itself is left out: what it offers is loaded when it is read."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name] - {"sparc_kernels"}):
            if around := walk(target, [*trail, name]):
                return around
        done.add(name)
        return []

    return next((around for name in sorted(graph) if (around := walk(name, []))), [])


@functools.cache
def graph_of(folder: Path) -> dict[str, set[str]]:
    named = modules(folder)
    return {name: imports(name, path, named) for name, path in named.items()}


def test_rooms_import_only_what_is_below_them():
    graph = graph_of(PACKAGE)
    assert len(graph) > 60 and sum(map(len, graph.values())) > 200
    assert against_the_rule(graph) == []


def test_no_module_imports_itself_by_a_detour():
    assert circle(graph_of(PACKAGE)) == []
    assert circle(graph_of(ROOT / "benchmarks")) == []


def test_an_arrow_against_the_rule_and_a_circle_are_seen():
    graph = copy.deepcopy(graph_of(PACKAGE))
    graph["sparc_kernels.core.numerics"].add("sparc_kernels.ops.adam")
    assert against_the_rule(graph) == ["sparc_kernels.core.numerics imports sparc_kernels.ops.adam"]
    assert circle(graph)[:1] == circle(graph)[-1:] != []
