"""One import is enough: documents and notebooks reach nothing deeper, and find all they need."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import dfq_jax as dfq

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = {"dfq_jax", *(f"dfq_jax.{name}" for name in dfq.NAMESPACES)}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def modules(code):
    """Names of all modules of this package that a program imports, at its top or inside."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & DOCUMENTED) or {node.module}
    return {name for name in found if name.split(".")[0] == "dfq_jax"}


def test_imports_are_found():
    code = """
import jax, dfq_jax as dfq
from dfq_jax import methods
def f():
    from dfq_jax.recipes.best import best
    import dfq_jax.io.load as load
"""
    assert modules(code) == {
        *("dfq_jax", "dfq_jax.methods", "dfq_jax.recipes.best", "dfq_jax.io.load")
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_import_nothing_deeper(path):
    assert "dfq_jax" in modules(path.read_text()) <= DOCUMENTED


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documents_import_nothing_deeper(path):
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        assert modules(block) <= DOCUMENTED


@pytest.mark.parametrize("space", dfq.NAMESPACES)
def test_namespaces_are_explained(space):
    module = getattr(dfq, space)
    assert sorted(module.__all__) == module.__all__
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


def test_all_methods_with_a_name_are_there():
    """As factories: what a name does, a value can."""
    from dfq_jax.recipes.presets import OFFERS
    from dfq_jax.recipes.reconstructions import LEARNED

    for name, offer in OFFERS.items():
        assert getattr(dfq.methods, name) is offer.make
    for name, method in LEARNED.items():
        factory = getattr(dfq.methods, {"best": "best_rounding"}.get(name, name))
        assert factory is method
