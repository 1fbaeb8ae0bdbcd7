"""Messages name options as Python has them; the command line turns them into flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dfq_jax
from dfq_jax.report.console import flagged

ROOT = Path(dfq_jax.__file__).parent
WRITERS = {
    "base/words.py",
    *("allocation/remedies.py", "recipes/untried.py", "report/diagnosis.py", "report/console.py"),
}
"""Modules that write down command lines."""
OTHERS = ("pip install", "--no-deps", "tf2onnx")
"""Whose flags messages may have: those of other programs."""
FLAG = re.compile(r"(?<![\w(-])--[a-z][a-z-]+\b(?!:)|--[a-z-]+ [A-Z]")


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ('say `layout="nchw"` if not', "say --layout nchw if not"),
        ("with `mean=` and `std=`.", "with --mean and --std."),
        ("`size=(48, 192)` or `size=224`", "--size 48x192 or --size 224"),
        ("`mean=(0.5, 0.25)`", "--mean 0.5,0.25"),
        ("pass `no_bn_fallback=True`:", "pass --no-bn-fallback:"),
        ("try `arch='resnet20'`", "try --arch resnet20"),
        ("smaller `n=`, `seed=3`", "smaller -n, --seed 3"),
        ("`dfq inspect`, Clip(low=0), `a b=c`", "`dfq inspect`, Clip(low=0), `a b=c`"),
    ],
)
def test_options_become_flags(told, wanted):
    assert flagged(told) == wanted


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a module but its docstrings, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in documented)
    yield from ((n.lineno, n.value) for n in texts if isinstance(n.value, str))


def shared() -> list[str]:
    """Modules that Python callers and the command line use alike."""
    names = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
    return [n for n in names if n not in WRITERS and not n.startswith(("cli/", "report/html"))]


@pytest.mark.parametrize("name", shared())
def test_python_callers_are_not_told_flags(name):
    found = [
        (line, text)
        for line, text in messages(ROOT / name)
        if FLAG.search(text) and not any(other in text for other in OTHERS)
    ]
    assert not found
