"""The scripts in benchmarks/: arguments, JSON, and what they do without data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MEASURING = ("import_accuracy", "latency", "lowering", "ptq", "synthesis_quality", "verify")
MAKING = ("import_zoo", "quantize_zoo", "fuzz_readers", "synthesis_speed")  # with data of their own
SCRIPTS = (*MEASURING, *MAKING, "run_all", "update_results")


def run(name: str, *arguments: object) -> str:
    """Stdout of a script that must succeed."""
    line = [sys.executable, FOLDER / f"{name}.py", *arguments]
    ran = subprocess.run([str(a) for a in line], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_script_is_listed():
    helpers = {"common", "artifacts", "torch_reference", "zoo_networks"}
    helpers |= {"synthesis_loops", "image_measures"}
    assert {p.stem for p in FOLDER.glob("*.py")} == {*SCRIPTS, *helpers}
    guide = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in guide] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name):
    assert "usage" in run(name, "--help")


@pytest.mark.parametrize("name", [n for n in MEASURING if n != "lowering"])
def test_without_data(name, tmp_path):
    found = json.loads(run(name, "--json", "--shared", tmp_path))
    assert found["rows"] == []
    assert "which is absent" in found["reason"]
    assert {"machine", "versions", "tables"} <= found.keys()
    assert str(tmp_path) not in json.dumps(found)
    assert "which is absent" in run(name, "--shared", tmp_path)


def test_wrong_choice():
    line = [sys.executable, str(FOLDER / "ptq.py"), "--networks", "lenet"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "'lenet' is none of efficientnet_lite0, resnet20" in ran.stderr


def test_lowering_and_its_tables(tmp_path):
    text = run("lowering", "--json", "--rows", "tiny", "--rounds", "2", "--no-torch")
    rows = json.loads(text)["rows"]
    assert [row["what"] for row in rows] == ["forward", "input gradient", "full gradient", "scan"]
    assert all(row["ours_ms"] > 0 and row["native_ratio"] > 0 for row in rows)

    (tmp_path / "lowering.json").write_text(text)
    page = tmp_path / "RESULTS.md"
    page.write_text(
        "<!-- begin lowering -->\n<!-- end lowering -->\n<!-- begin scan -->\nold\n"
        "<!-- end scan -->\n<!-- begin ptq -->\nkept\n<!-- end ptq -->\n"
    )
    run("update_results", "--folder", tmp_path, "--results", page)
    once = page.read_text()
    assert once.count("| 3x3, 2x8x8x8 |") == 4
    assert "PyTorch ms" not in once  # a column without values
    assert "kept" in once
    assert "old" not in once
    run("update_results", "--folder", tmp_path, "--results", page)
    assert page.read_text() == once


@pytest.mark.torch
def test_imports_of_the_zoo():
    options = ("--networks", "squeezenet1_1", "--no-onnx", "--time", "")
    (row,) = json.loads(run("import_zoo", "--json", *options))["rows"]
    assert (row["table"], row["network"], row["note"]) == ("import_pt2", "squeezenet1_1", "")
    assert 0 < row["pt2"] < 1e-4
    assert 0 < row["runtime"] < 1e-4


def test_results_page_has_a_place_for_every_table():
    page = (FOLDER.parent / "docs" / "RESULTS.md").read_text()
    tables = ("import_accuracy", "ptq", "verify", "latency", "lowering", "scan")
    zoo = ("import_zoo", "import_pt2", "import_time", "quantize_zoo", "fuzz_readers")
    for name in (*tables, *zoo):
        assert page.count(f"<!-- begin {name} -->") == page.count(f"<!-- end {name} -->") == 1


@pytest.mark.slow
@pytest.mark.onnx
def test_quantization_of_a_small_run(shared, tmp_path):
    pytest.importorskip("onnxruntime")
    options = ("--networks", "resnet20", "--images", "8", "--shared", shared)
    text = run("verify", "--json", "--schemes", "w8a8", *options)
    rows = json.loads(text)["rows"]
    assert [row["images"].split()[1] for row in rows] == ["synthetic", "real"]
    assert all(row["simulator_steps"] <= 1 and row["on"] > 0.9 for row in rows)


@pytest.mark.torch
def test_speed_of_a_small_run():
    pytest.importorskip("torch")
    small = ("--batch", 2, "--size", 32, "--steps", 1, "--rounds", 1)
    found = json.loads(run("synthesis_speed", "--networks", "resnet20", *small, "--json"))
    (row,) = found["rows"]
    assert (row["network"], row["batch"]) == ("resnet20", 2)
    for key in ("ratio_input_only", "ratio_published_loop", "images_per_s", "peak_mib"):
        assert row[key] > 0
