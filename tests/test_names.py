"""A name of a type means one thing in the whole package."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dfq_jax"
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
