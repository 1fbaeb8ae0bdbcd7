"""The structure STYLE asks for: layers that import downward, small files, small functions."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dfq_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"errors", "normalisation", "types", "values", "examples"},
    {"base", "graph", "numerics"},
    {"optim", "data", "passes", "quantization"},
    {"allocation", "pruning", "reconstruction", "synthesis"},
    {"training"},
    {"io", "report"},
    {"recipes"},
    {"api"},
    {"cli"},
    {"edits", "methods", "parts"},
    {"__init__", "__main__"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

ONLY_IN = {
    "torch": ("io/", "data/"),
    "torchvision": ("io/", "data/"),
    "onnx": ("io/", "data/"),
    "onnxruntime": ("io/", "data/"),
    "tensorflow_datasets": ("io/", "data/"),
    "flax": ("io/", "data/", "synthesis/sources/generator.py"),
    "orbax": ("optim/state.py",),
}

NO_METHODS = {
    *("__init__", "diagnose", "expense", "foresight", "joint", "mixed", "pipeline", "presets"),
    *("probes", "quantized", "reconstructions", "retraining", "rows", "sizes", "trainings"),
    "untried",
}
"""Files of `recipes/` that offer, compose or judge methods."""
LONGEST_METHOD = {"deepinversion": 195, "dfq": 166}
"""Two published settings and stages of two sizes; all arguments of the pipeline."""


def imports(path: Path) -> list[str]:
    """Absolute names of all modules a file imports, at its top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def unit(module: tuple[str, ...]) -> str:
    """The folder or top-level module a module belongs to."""
    return module[0] if module and module[0] in RANK else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    relative = path.relative_to(PACKAGE)
    here = unit(relative.with_suffix("").parts)
    assert len(relative.parts) > 1 or relative.stem in RANK, f"{relative} is in no layer"
    assert relative.parts[0].removesuffix(".py") in RANK, f"{relative.parts[0]} is in no layer"
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "dfq_jax":
            there = unit(tuple(rest))
            ground = RANK[here] == RANK[there] == 0
            assert here == there or ground or RANK[there] < RANK[here], f"{relative}: {name}"
        for place in [ONLY_IN[root]] if root in ONLY_IN else []:
            assert str(relative.as_posix()).startswith(place), f"{relative}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_file_of_a_method_is_its_formula_and_its_settings():
    """What others could use is a term, a source or a formula, and lies among these."""
    lengths = {p.stem: len(p.read_text().splitlines()) for p in (PACKAGE / "recipes").glob("*.py")}
    methods = {name: length for name, length in lengths.items() if name not in NO_METHODS}
    assert len(methods) > 30
    assert not {n: v for n, v in methods.items() if v > LONGEST_METHOD.get(n, 130)}
