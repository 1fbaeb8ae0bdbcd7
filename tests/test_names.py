"""A name of a type, or of a function that other files import, means one thing in the package."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dfq_jax"
SAME_WORD = {
    "a verb of the API, and the function below that does its work": (
        *("bench", "evaluate", "load", "probes_of", "quantize", "verify"),
    ),
    "a method by the name of its paper, and its way of rounding": ("adaround", "flexround"),
    "the images of a method, and the method": ("noise",),
    "one after the other, of passes and of augmentations": ("compose",),
}
"""{why: names of functions that two files define for others}."""
SHAPED = ("Float", "Float32", "Int", "Shaped", "UInt8", "TypeVar")
"""Arrays of a shape, and type variables, are words of their file."""


def types_of(path: Path) -> dict[str, str]:
    """{class or alias at the top of a file: its source}."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, ast.unparse(node.value)
            if not name.isupper() and name[0].isupper() and not value.startswith(SHAPED):
                found[name] = value
    return found


def test_a_type_has_one_meaning():
    """Two files may spell the same alias; no name may stand for two things."""
    meanings = defaultdict(lambda: defaultdict(list))
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, value in types_of(path).items():
            meanings[name][value].append(str(path.relative_to(PACKAGE)))
    several = {n: list(found.values()) for n, found in meanings.items() if len(found) > 1}
    assert len(meanings) > 300
    assert not several


def imported() -> dict[str, set[str]]:
    """{name that files import from another: the modules that they import it from}."""
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    found[alias.name].add(node.module)
    return found


def functions_for_others() -> dict[str, list[str]]:
    """{function that files import from another: the modules that define it}."""
    known, found = imported(), defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and module in known[node.name]:
                found[node.name].append(module)
    return found


def test_a_function_that_others_import_has_one_meaning():
    """Helpers of a file may be called like those of another; nobody else meets them."""
    every = functions_for_others()
    assert len(every) > 1000
    several = {name for name, modules in every.items() if len(modules) > 1}
    allowed = [name for names in SAME_WORD.values() for name in names]
    assert several == set(allowed)
