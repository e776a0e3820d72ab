"""A file imports only from lines above its own, and a third party only where it is allowed."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# bottom to top; files on one line do not import each other
ORDER = [
    ("kernels._math",),
    ("kernels._tiling",),
    ("kernels._tiling_wide",),
    ("kernels._pack",),
    ("kernels.weight_gradients",),
    ("kernels._packing",),
    ("kernels._packing_gru",),
    ("kernels._forward", "kernels._backward"),
    ("kernels.siamese_fwd", "kernels.siamese_bwd", "kernels.pairwise"),
    ("kernels.siamese_gru_fwd", "kernels.siamese_gru_bwd"),
    ("kernels._wide",),
    ("kernels.siamese_wide_fwd", "kernels.siamese_wide_bwd"),
    ("reference",),
    ("_steps",),
    ("batched_lstm", "batched_gru"),
    ("_packed",),
    ("compiled",),
    ("batched",),
    ("_measured",),
    ("_backend",),
    ("_topk",),
    ("_layer",),
    ("_ops",),
    ("_checks",),
    ("_network",),
    ("functional",),
    ("modules",),
    ("foreign",),
    ("graph",),
    ("device", "whole_file"),
    ("text.files",),
    ("text.columns", "text.legacy", "text.tables"),
    ("text.datasets",),
    ("text.streams",),
    ("text.tokens",),
    ("text.vocabulary",),
    ("text.vector_files",),
    ("text.vectors",),
    ("text.batches",),
    ("text.synonyms",),
    ("text.scored",),
    ("text",),
    ("sample",),
    ("calibration",),
    ("saved",),
    ("model",),
    ("bulk",),
    ("",),  # fastsiam/__init__.py: its names are those of the lines so far
    ("training.config",),
    ("training.objective", "training.pair_file"),
    ("training.data",),
    ("training.fingerprint", "training.start"),
    ("training.world",),
    ("training.evaluate",),
    ("training.randomness", "training.signals", "training.pack"),
    ("training.checkpoint",),
    ("training.guard", "training.running", "training.source", "training.stream", "training.report"),
    ("training.logs", "training.epoch", "training.phase"),
    ("training.run",),
    ("training.fit",),
    ("training.loop",),
    ("training.recipe",),
    ("training",),
    ("cli_exit", "cli_options", "cli_screen"),
    ("cli_demo", "cli_train", "cli_evaluate", "cli_bulk"),
    ("cli",),
    ("__main__",),
]
LINE = {name: line for line, names in enumerate(ORDER) for name in names}

# where a third party lives: nobody else may import it, even when a function runs
HOME = {"triton": "kernels.", "typer": "cli", "rich": "cli"}
# torch is everywhere; every other third party waits until a function needs it


def module_name(file: Path) -> str:
    """Name a file as ORDER does: below fastsiam, with kernels/ as fastsiam/kernels/."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "fastsiam" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "fastsiam").rglob("*.py")]
    # some versions of Python follow the link fastsiam/kernels and some do not
    link = ROOT / "fastsiam" / "kernels"
    return sorted(file for file in files if link not in file.parents)


FILES = {module_name(file): file for file in source_files()}


def imports(source: str, name: str) -> Iterator[tuple[str, bool, int]]:
    """Yield (module, runs when the file is imported, line) for each import of a file.

    `from fastsiam import x` is an import of fastsiam.x where there is such a file.
    """

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    raise ValueError(f"{name}, line {child.lineno}: a relative import")
                base = child.module or ""
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    is_file = full.removeprefix("fastsiam.") in LINE
                    yield (full if is_file else base, at_import, child.lineno)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                hint = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, at_import and not inside and not hint)

    return visit(ast.parse(source), True)


def faults(source: str, name: str) -> list[str]:
    """Say what a file imports that it must not."""
    found = []
    for module, at_import, line in imports(source, name):
        top = module.partition(".")[0]
        where = f"{name or '__init__'}, line {line}: "
        if top == "fastsiam":
            target = module.partition(".")[2]
            if target not in LINE:
                found.append(f"{where}{module} is not in ORDER")
            elif LINE[target] >= LINE[name]:
                found.append(f"{where}{module} is not above it")
        elif top not in sys.stdlib_module_names:
            if top in HOME and not name.startswith(HOME[top]):
                found.append(f"{where}{top} does not belong here")
            elif at_import and top not in {"torch", *HOME}:
                found.append(f"{where}{top} must be imported where it is used")
    return found


def test_every_file_is_in_the_order():
    assert "modules" in FILES
    assert sorted(set(FILES) - set(LINE)) == []


@pytest.mark.parametrize("name", sorted(set(FILES) & set(LINE)), ids=lambda name: name or "init")
def test_imports_only_from_above(name):
    assert faults(FILES[name].read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("batched", "from fastsiam import functional", "not above"),
        ("batched", "from fastsiam.modules import SiameseLSTM", "not above"),
        ("batched", "import fastsiam.modules", "not above"),
        ("batched", "from fastsiam import SiameseLSTM", "not above"),
        ("batched", "def f():\n    from fastsiam import _ops", "not above"),
        ("training.loop", "from fastsiam.registry import x", "not in ORDER"),
        ("kernels.siamese_fwd", "from fastsiam.kernels import siamese_bwd", "not above"),
        ("functional", "import triton", "does not belong"),
        ("functional", "def f():\n    import triton", "does not belong"),
        ("training.loop", "import rich.progress", "does not belong"),
        ("text.tokens", "import nltk", "where it is used"),
        ("text.tokens", "try:\n    import gensim\nexcept ImportError:\n    pass", "where it is"),
        ("model", "class A:\n    import numpy as np", "where it is used"),
    ],
)
def test_a_fault_is_found(name, source, fault):
    assert [fault in message for message in faults(source, name)] == [True]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "modules",
            "import math\nimport torch.nn.functional as F\nfrom fastsiam import functional",
        ),
        ("_ops", "def f():\n    from fastsiam.kernels import _packing"),
        ("text.tokens", "def f():\n    import nltk"),
        ("text.vectors", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
        ("", "from fastsiam.modules import SiameseLSTM"),
    ],
)
def test_what_is_allowed_passes(name, source):
    assert faults(source, name) == []
