"""Imports point downward only: the rooms of peftlite in order, the modules of core in order, no cycle, none hidden.

The imports are read from the source, not run. Those under `TYPE_CHECKING` count too: knowing a type of a room above is
knowing that room. So do those that `later` puts off. `peftlite/__init__.py`, which resolves the public names lazily
from a table, is the one exception.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "peftlite"
ROOMS = (
    ("errors", "registry"),
    ("patterns", "reading"),
    ("checks",),
    ("config",),
    ("defaults",),
    ("core",),
    ("tuners",),
    ("checkpoint",),
    ("convert", "hotswap", "optimizers", "helpers", "kinds"),
    ("wrapping",),
    ("base_tuner",),
    ("model",),
    ("auto", "entry", "mapping"),
    ("integrations",),
    ("standin",),
    ("as_peft", "cli", "_hooks"),
)
CORE = (
    "room",
    "transaction",
    "lean",
    "slots",
    "state",
    "former",
    "hosts",
    "packed",
    "written",
    "residency",
    "variant",
    "call",
    "rows",
    "scaling",
    "merging",
    "tied",
    "stored",
    "edited",
    "layer",
    "fused",
    "targets",
    "sharding",
    "tree",
    "modes",
    "replicas",
    "facts",
    "found",
    "plan",
    "ties",
    "unpacking",
    "binding",
    "outputs",
    "inputs",
    "inject",
    "lifecycle",
    "leaving",
    "overlay",
    "status",
)
CORE_MAY_USE = {PACKAGE, "torch", "typing_extensions", *sys.stdlib_module_names}
ROOM_RANK = {name: rank for rank, level in enumerate(ROOMS) for name in level}
CORE_RANK = {name: rank for rank, name in enumerate(CORE)}


@dataclass(frozen=True)
class Import:
    """One import in a source file: the absolute dotted name, the line, and whether it stands inside a function."""

    target: str
    line: int
    hidden: bool


def module_name(root: Path, file: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package at `root`, but for the package's own `__init__.py`."""
    found = {module_name(root, file): file for file in sorted(root.rglob("*.py"))}
    found.pop(root.name, None)
    return found


class Reader(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, module: str, is_package: bool, known: frozenset[str]) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.known = known
        self.depth = 0
        self.found: list[Import] = []

    def add(self, target: str, node: ast.AST) -> None:
        self.found.append(Import(target, getattr(node, "lineno", 0), self.depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        inner = [f"{base}.{alias.name}" for alias in node.names]
        for target in dict.fromkeys(name if name in self.known else base for name in inner):
            self.add(target, node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if called in {"import_module", "__import__", "later"} and isinstance(first, str):
            self.add(f"{self.package}{first}" if first.startswith(".") else first, node)
        self.generic_visit(node)

    def visit(self, node: ast.AST) -> None:
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        self.depth += inside
        super().visit(node)
        self.depth -= inside


def imports(root: Path) -> dict[str, list[Import]]:
    files = sources(root)
    known = frozenset(files)
    result = {}
    for module, file in files.items():
        reader = Reader(module, file.name == "__init__.py", known)
        reader.visit(ast.parse(file.read_text(encoding="utf-8")))
        result[module] = reader.found
    return result


def place(module: str) -> tuple[str, str]:
    """(room, module of core), each "" where there is none: peftlite.core.call -> ("core", "call")."""
    _, room, inner, *_ = [*module.split("."), "", ""]
    return room, inner if room == "core" else ""


def unplaced(module: str) -> str | None:
    room, inner = place(module)
    if room not in ROOM_RANK:
        return f"{module}: `{room}` has no place in ROOMS; put it where its imports point downward only"
    if inner and inner not in CORE_RANK:
        return f"{module}: `{inner}` has no place in CORE; put it where its imports point downward only"
    return None


def upward(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, both of peftlite and of known places; None if it may."""
    (room, inner), (target_room, target_inner) = place(module), place(target)
    if not target_room and room == "as_peft":  # stands in for a whole package: the front door is what it hands out
        return None
    if not target_room:
        return f"imports the package's front door `{target}` instead of the module that defines the name"
    if target_room != room:
        below = ROOM_RANK.get(target_room, len(ROOMS)) < ROOM_RANK[room]
        return None if below else f"imports `{target}`: `{target_room}` is not below `{room}`"
    if room != "core" or not inner or inner == target_inner:
        return None
    below = bool(target_inner) and CORE_RANK.get(target_inner, len(CORE)) < CORE_RANK[inner]
    return None if below else f"imports `{target}`, which is not below `{inner}` in core"


def cycles(graph: dict[str, set[str]]) -> Iterator[str]:
    """What is left of the graph when every module without unresolved imports is taken away, again and again."""
    left = {module: targets & set(graph) for module, targets in graph.items()}
    while free := {module for module, targets in left.items() if not targets}:
        left = {module: targets - free for module, targets in left.items() if module not in free}
    if left:
        yield f"import cycle among {', '.join(sorted(left))}"


def problems_of(module: str, found: list[Import]) -> Iterator[str]:
    for item in found:
        top = item.target.partition(".")[0]
        if place(module)[0] == "core" and top not in CORE_MAY_USE:
            yield f"{module}:{item.line}: core imports `{item.target}`; it may use torch and the standard library"
        if top != PACKAGE:
            continue
        if item.hidden:
            yield f"{module}:{item.line}: `{item.target}` is imported inside a function"
        if why := upward(module, item.target):
            yield f"{module}:{item.line}: {why}"


def violations(root: Path) -> list[str]:
    """Every breach of the order in the package at `root`, as `module:line: what`."""
    everything = imports(root)
    lost = [message for module in everything if (message := unplaced(module))]
    placed = {module: found for module, found in everything.items() if not unplaced(module)}
    wrong = [message for module, found in placed.items() for message in problems_of(module, found)]
    graph = {module: {item.target for item in found} - {module} for module, found in everything.items()}
    return [*lost, *wrong, *cycles(graph)]


def test_imports_of_peftlite_point_downward() -> None:
    root = Path(__file__).parent.parent / PACKAGE
    assert sources(root), f"no modules under {root}"
    found = violations(root)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("config.py", "from peftlite.core.slots import Slot", "`core` is not below `config`"),
        ("errors.py", "import peftlite.config", "`config` is not below `errors`"),
        ("core/slots.py", "from .layer import AdapterLayer", "not below `slots` in core"),
        ("core/call.py", "from . import layer", "not below `call` in core"),
        ("core/layer.py", "from peftlite.core import View", "not below `layer` in core"),
        ("core/hosts.py", "from peftlite.tuners.lora import Lora", "`tuners` is not below `core`"),
        ("core/hosts.py", "if TYPE_CHECKING:\n    from peftlite.model import PeftModel", "`model` is not below `core`"),
        ("core/hosts.py", "def f():\n    import transformers", "core imports `transformers`"),
        ("core/hosts.py", "import numpy as np", "core imports `numpy`"),
        ("core/helpers.py", "", "`helpers` has no place in CORE"),
        ("extras.py", "", "`extras` has no place in ROOMS"),
        ("model.py", "from peftlite import LoraConfig", "front door `peftlite`"),
        ("model.py", "def f():\n    from peftlite.config import PeftConfig", "is imported inside a function"),
        ("model.py", "f = lambda: importlib.import_module('peftlite.config')", "is imported inside a function"),
        ("model.py", "def f():\n    return later('peftlite.config')", "is imported inside a function"),
        ("core/hosts.py", "x = later('peftlite.tuners.lora')", "`tuners` is not below `core`"),
        ("model.py", "class A:\n    async def f(self):\n        from . import config", "is imported inside a function"),
        ("cli.py", "import peftlite.as_peft", "`as_peft` is not below `cli`"),
        ("checkpoint/keys.py", "from peftlite.checkpoint import files", "import cycle among"),
    ],
)
def test_a_breach_is_named(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    root = tmp_path / PACKAGE
    for name in ("config.py", "core/layer.py", "checkpoint/files.py", file):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "checkpoint" / "files.py").write_text("from peftlite.checkpoint import keys")
    (root / file).write_text(source)
    found = violations(root)
    assert len(found) == 1, found
    assert complaint in found[0]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    root = tmp_path / PACKAGE
    files = {
        "__init__.py": "def __getattr__(name):\n    import peftlite.model\n    return peftlite.model",
        "errors.py": "import difflib",
        "core/__init__.py": "from peftlite.core.layer import AdapterLayer",
        "core/slots.py": "import torch\nfrom ..errors import PeftliteError",
        "core/layer.py": "from . import slots\nfrom .slots import Slot",
        "tuners/lora/__init__.py": "from .variant import Lora",
        "tuners/lora/variant.py": "from peftlite.core.layer import AdapterLayer\nfrom peftlite import errors",
        "integrations/transformers.py": "def f():\n    import transformers\n    import bitsandbytes",
    }
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    assert violations(root) == []
