"""A file imports from folders below its own, and a third party only where it is allowed."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# folders and files of fastsiam, bottom to top; "" is fastsiam/__init__.py
LAYERS = [
    ("kernels",),
    ("engine",),
    ("modules", "functional", "search", "graph", "convert", "checks"),
    ("text", "device"),
    ("model", "model_folder", "bulk", "calibration"),
    ("",),
    ("training",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# where a third party lives: nobody else may import it, even when a function runs
HOME = {"triton": ("kernels", "engine.triton"), "typer": ("cli",), "rich": ("cli",)}


def module_name(file: Path) -> str:
    """Name a file below fastsiam, with kernels/ as fastsiam/kernels/."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "fastsiam" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "fastsiam").rglob("*.py")]
    # some versions of Python follow the link fastsiam/kernels and some do not
    link = ROOT / "fastsiam" / "kernels"
    return sorted(file for file in files if link not in file.parents)


FILES = {module_name(file): file for file in source_files()}


def imports(source: str) -> Iterator[tuple[str, bool, int]]:
    """Yield (module, runs when the file is imported, line) for each import of a file."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                if base == "fastsiam":
                    yield from (
                        (f"fastsiam.{a.name}", at_import, child.lineno) for a in child.names
                    )
                else:
                    yield base, at_import, child.lineno
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                hint = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, at_import and not inside and not hint)

    return visit(ast.parse(source), True)


def faults(source: str, name: str) -> list[str]:
    """Say what a file imports that it must not."""
    found = []
    own = RANK[name.partition(".")[0]]
    for module, at_import, line in imports(source):
        top, _, inner = module.partition(".")
        where = f"{name or '__init__'}, line {line}: "
        if top == "fastsiam":
            # a name of fastsiam/__init__.py, such as SiameseLSTM, has its rank
            rank = RANK.get(inner.partition(".")[0], RANK[""])
            if rank > own or (rank == own and not name):
                found.append(f"{where}{module} is in a layer above")
        elif not top:
            found.append(f"{where}a relative import")
        elif top not in sys.stdlib_module_names:
            homes = HOME.get(top, ())
            at_home = any(name == home or name.startswith(f"{home}.") for home in homes)
            if homes and not at_home:
                found.append(f"{where}{top} does not belong here")
            elif at_import and top != "torch" and not homes:
                found.append(f"{where}{top} must be imported where it is used")
    return found


@pytest.mark.parametrize("name", sorted(FILES), ids=lambda name: name or "init")
def test_imports_only_from_its_layer_and_below(name):
    assert faults(FILES[name].read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("engine.network", "from fastsiam import functional", "above"),
        ("engine.network", "from fastsiam.modules import SiameseLSTM", "above"),
        ("engine.network", "import fastsiam.modules", "above"),
        ("engine.network", "from fastsiam import SiameseLSTM", "above"),
        ("kernels.tiling", "def f():\n    from fastsiam.engine import layer", "above"),
        ("functional", "import triton", "does not belong"),
        ("functional", "def f():\n    import triton", "does not belong"),
        ("training.loop", "import rich.progress", "does not belong"),
        ("text.tokens", "import nltk", "where it is used"),
        ("text.tokens", "try:\n    import gensim\nexcept ImportError:\n    pass", "where it is"),
        ("model", "class A:\n    import numpy as np", "where it is used"),
        ("model", "from . import modules", "relative"),
    ],
)
def test_a_fault_is_found(name, source, fault):
    assert [fault in message for message in faults(source, name)] == [True]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("modules", "import math\nimport torch\nfrom fastsiam import functional"),
        ("engine.autograd", "def f():\n    from fastsiam.kernels import tiling"),
        ("text.tokens", "def f():\n    import nltk"),
        ("text.vectors", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
        ("", "from fastsiam.modules import SiameseLSTM"),
    ],
)
def test_what_is_allowed_passes(name, source):
    assert faults(source, name) == []
