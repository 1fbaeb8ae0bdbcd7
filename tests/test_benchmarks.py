"""The scripts in benchmarks/: arguments, JSON, and what they do without data."""

import argparse
import contextlib
import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MEASURING = (
    *("best_ablation", "dsg_ablation", "few_bits", "import_accuracy", "latency", "lowering"),
    *("folded", "mixed_precision", "pruning", "ptq", "reconstruction", "reconstruction_memory"),
    *("reconstruction_reference", "rounding_ablation", "smaller", "stages_ablation"),
    *("synthesis_quality", "tasks", "training", "training_reference", "transfer"),
    *("trust", "verify"),
)
MAKING = (
    "coupled_channels",
    "import_zoo",
    "quantize_zoo",
    "damaged_files",
    "faults",
    "first_run",
    "fuzz_readers",
    "synthesis_speed",
    "reconstruction_speed",
    "scaling",
)  # with data of their own
SCRIPTS = (*MEASURING, *MAKING, "run_all", "update_results")


def run(name: str, *arguments: object) -> str:
    """Stdout of a script that must succeed."""
    line = [sys.executable, FOLDER / f"{name}.py", *arguments]
    ran = subprocess.run([str(a) for a in line], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Stdout of a script run in this process, which spares it the import of JAX."""
    monkeypatch.syspath_prepend(FOLDER)

    def run_here(name: str, *arguments: object) -> str:
        file = str(FOLDER / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        capsys.readouterr()
        with contextlib.suppress(SystemExit):  # `--help` ends so
            runpy.run_path(file, run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_every_script_is_listed():
    helpers = {"common", "artifacts", "torch_reference", "zoo_networks", "file_mutations"}
    helpers |= {"store_networks", "task_modules", "task_networks", "task_runs"}
    helpers |= {"tasks_images", "tasks_detection", "tasks_faces", "tasks_language", "tasks_encoder"}
    helpers |= {"synthesis_loops", "image_measures", "reconstruction_loops", "reconstruction_torch"}
    helpers |= {"training_torch"}
    helpers |= {"scaling_child", "scaling_model", "scaling_rows"}
    helpers |= {"fault_children", "fault_disks", "fault_inputs", "fault_pictures"}
    assert {p.stem for p in FOLDER.glob("*.py")} == {*SCRIPTS, *helpers}
    guide = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in guide] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, told):
    assert "usage" in told(name, "--help")


@pytest.mark.parametrize("name", [n for n in MEASURING if n != "lowering"])
def test_without_data(name, tmp_path, told):
    found = json.loads(told(name, "--json", "--shared", tmp_path))
    assert found["rows"] == []
    assert "which is absent" in found["reason"]
    assert {"machine", "versions", "tables"} <= found.keys()
    assert str(tmp_path) not in json.dumps(found)
    assert "which is absent" in told(name, "--shared", tmp_path)


def test_wrong_choice():
    line = [sys.executable, str(FOLDER / "ptq.py"), "--networks", "lenet"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "'lenet' is none of efficientnet_lite0, mobilenet_v2, resnet20" in ran.stderr


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


def test_channels_that_can_be_removed(told):
    options = ("--networks", "resnet20_cifar", "--json")
    (row,) = json.loads(told("coupled_channels", *options))["rows"]
    assert (row["groups"], row["sets"], row["channels"]) == (12, 400, 698)
    assert row["removable"] == 688 / 698  # all but the classes


@pytest.mark.torch
def test_imports_of_the_zoo():
    options = ("--networks", "squeezenet1_1", "--no-onnx", "--time", "")
    (row,) = json.loads(run("import_zoo", "--json", *options))["rows"]
    assert (row["table"], row["network"], row["note"]) == ("import_pt2", "squeezenet1_1", "")
    assert 0 < row["pt2"] < 1e-4
    assert 0 < row["runtime"] < 1e-4


@pytest.mark.onnx
def test_a_short_campaign_of_faults():
    """Nothing is lost or mixed, and nobody sees a traceback."""
    pytest.importorskip("onnx")
    counts = {"kills": 12, "disks": 4, "pairs": 2, "pictures": 20, "inputs": 120}
    text = run("faults", "--json", *(part for n, c in counts.items() for part in (f"--{n}", c)))
    rows = json.loads(text)["rows"]
    assert {row["kind"]: row["wrong"] for row in rows} == dict.fromkeys(
        ("kills", "full disk", "two writers", "pictures", "mutated inputs"), 0
    )
    assert sum(row.get("killed") or 0 for row in rows) >= 10
    assert sum(row["refused"] for row in rows if row["kind"] == "pictures") >= 10


def test_two_pages_share_the_tables(tmp_path):
    column = ["key", "heading", ""]
    facts: dict[str, Any] = {
        "machine": {"cpu": "c", "cores": 1, "instructions": [], "memory_gib": None, "os": "o"}
    }
    facts |= {"versions": {}, "reason": None, "command": "none", "date": "today"}
    facts |= {"tables": {"one": [column], "two": [column]}}
    facts |= {"rows": [{"table": name, "key": f"value of {name}"} for name in ("one", "two")]}
    (tmp_path / "made.json").write_text(json.dumps(facts))
    pages = [tmp_path / "FIRST.md", tmp_path / "SECOND.md"]
    for name, page in zip(("one", "two"), pages, strict=True):
        page.write_text(f"<!-- begin {name} -->\n<!-- end {name} -->\n")
    run("update_results", "--folder", tmp_path, "--results", *pages)
    assert "value of one" in pages[0].read_text()
    assert "value of two" not in pages[0].read_text()
    assert "value of two" in pages[1].read_text()
    line = [sys.executable, FOLDER / "update_results.py", "--folder", tmp_path, "--results"]
    ran = subprocess.run([*map(str, line), str(pages[0])], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "no place is marked for two")


def test_the_table_of_readme_has_a_column_for_each_scheme(scripts):
    row = {"network": "n", "judged": 1000, "float_top1": 0.9}
    rows = [{**row, "scheme": s, "top1": top1} for s, top1 in (("w4a4", 0.5), ("w8a8", 0.875))]
    lines = scripts("update_results").glance(rows).splitlines()
    assert lines[0] == "| network | images judged | FP32 | w8a8 | w4a4 |"
    assert lines[2:] == ["| n | 1,000 | 90.00 | 87.50 | 50.00 |"]
    assert (FOLDER.parent / "README.md").read_text().count("<!-- begin glance -->") == 1


def test_scaling_page_has_a_place_for_every_table(scripts):
    page = (FOLDER.parent / "docs" / "SCALING.md").read_text()
    for name in scripts("scaling").TABLES:
        assert page.count(f"<!-- begin {name} -->") == page.count(f"<!-- end {name} -->") == 1


def test_make_bench_runs_every_script(scripts):
    assert {script for script, *_ in scripts("run_all").RUNS.values()} == {*MEASURING, *MAKING}


@pytest.mark.parametrize("name", ["RESULTS.md", "NETWORKS.md"])
def test_every_place_of_a_page_is_filled_by_a_script(scripts, name):
    page = (FOLDER.parent / "docs" / name).read_text()
    places = re.findall(r"<!-- begin (\w+) -->", page)
    assert places == re.findall(r"<!-- end (\w+) -->", page)
    assert len(places) == len(set(places))
    runs = scripts("run_all").RUNS.values()
    assert set(places) <= set().union(*(tables_of(scripts(name), line) for name, *line in runs))


def tables_of(script: Any, line: list[str]) -> set[str]:
    """What a script calls its rows: its own name, names of its own, or what arguments say."""
    said = [line[line.index("--table") + 1]] if "--table" in line else []
    return {script.__name__, *getattr(script, "TABLES", ()), *said}


@pytest.mark.slow
@pytest.mark.torch
def test_both_loops_of_reconstruction_learn_the_same_units():
    pytest.importorskip("torch")
    found = [
        json.loads(run("reconstruction_loops", who, "--steps", "2").splitlines()[-1])["steps"]
        for who in ("ours", "pytorch")
    ]
    assert len(found[0]) == len(found[1]) == 11
    assert all(seconds > 0 for steps in found for seconds in steps.values())


@pytest.mark.slow
@pytest.mark.torch
def test_a_short_run_of_the_reference(shared):
    pytest.importorskip("torch")
    how = ("--steps", "100", "--n", "64", "--limit", "200", "--schemes", "w8a8")
    text = run("reconstruction_reference", "--json", "--shared", shared, *how)
    rows = json.loads(text)["rows"]
    assert [row["shortcuts"] for row in rows] == ["float", "quantized"]
    assert all(row["top1"] > 0.8 for row in rows)


@pytest.mark.slow
@pytest.mark.onnx
def test_quantization_of_a_small_run(shared, tmp_path):
    pytest.importorskip("onnxruntime")
    options = ("--networks", "resnet20", "--images", "8", "--shared", shared)
    text = run("verify", "--json", "--schemes", "w8a8", *options)
    rows = json.loads(text)["rows"]
    assert [row["images"].split()[1] for row in rows] == ["synthetic", "real"]
    assert all(row["simulator_steps"] <= 1 and row["on"] > 0.9 for row in rows)


@pytest.mark.slow
@pytest.mark.torch
def test_speed_of_a_small_run():
    pytest.importorskip("torch")
    small = ("--batch", 2, "--size", 32, "--steps", 1, "--rounds", 1)
    found = json.loads(run("synthesis_speed", "--networks", "resnet20", *small, "--json"))
    (row,) = found["rows"]
    assert (row["network"], row["batch"]) == ("resnet20", 2)
    for key in ("ratio_input_only", "ratio_published_loop", "images_per_s", "peak_mib"):
        assert row[key] > 0


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script, or what scripts share."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_work_of_a_small_network(scripts, nets):
    """6x6 pixels; 3x3 convolution to 3x3x4, 1x1 convolution to 3x3x5, pooling, five classes."""
    model = nets.stem()
    found = scripts("scaling_model").work_of(model, 9, 2)
    first, second = 3 * 3 * 4, 3 * 3 * 5
    assert found.macs == first * 3 * 3 * 3 + second * 4 + 5 * 5
    assert found.written == 3 * first + 3 * second + 5 + 5  # convolution, batch norm, ReLU; ends
    assert found.fused == 2 * first + 2 * second + 5 + 5  # no batch norm writes what is kept
    assert found.parameters == (27 * 4 + 4 * 4) + (4 * 5 + 4 * 5) + (25 + 5)
    assert (found.channels, found.norms, found.pixels) == (9, 2, 108)
    assert found.depthwise == 0
    tiny = scripts("scaling_model").work_of(nets.tiny(), 0, 0)
    assert tiny.depthwise == 8 * 8 * 6 * 3 * 3  # six channels apart, 3x3, stride 1


def test_costs_of_a_step(scripts):
    model = scripts("scaling_model")
    work = model.Work(1000, 0, 60, 40, parameters=32, channels=7, norms=2, pixels=12)
    assert work.step_flops == 4000
    assert work.optimizer_bytes == 12 * 4 * (4 + 3)
    assert work.step_bytes(2, 8) == 2 * (5 * 40 + 2 * 32 / 8) + 336
    assert work.step_bytes(4, 1, fused=False) == 4 * (5 * 60 + 2 * 32) + 336
    assert work.reduced_bytes == 4 * (2 + 1) * 7


def test_a_roofline_has_two_sides(scripts):
    model = scripts("scaling_model")
    work = model.Work(1000, 0, 60, 40, parameters=0, channels=7, norms=2, pixels=0)
    chip = model.Chip("chip", bfloat16=1e6, float32=1e5, bandwidth=1e6, source="")
    seconds = lambda dtype, *ceiling: model.step_seconds(
        work, chip, dtype, 3, model.Ceiling(*ceiling)
    )
    assert seconds("bfloat16", 0.5, 0.8) == pytest.approx(3 * 4000 / 0.5e6)
    assert seconds("float32", 1.0, 0.8) == pytest.approx(3 * 4000 / 1e5)
    assert seconds("bfloat16", 1.0, 0.08) == pytest.approx(3 * 2 * 5 * 40 / 0.08e6)
    assert seconds("float32", 1.0, 0.01) == pytest.approx(3 * 4 * 5 * 40 / 0.01e6)


def test_chips_apart_are_linear_until_batches_run_out(scripts):
    model = scripts("scaling_model")
    spent = lambda images, chips: model.pod_seconds(images, chips, 10, 4, 0.5)
    assert [spent(80, chips) for chips in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 2]
    assert spent(81, 8) == 4
    assert spent(1, 1) == 2
    assert [model.readable(s) for s in (0.04, 119, 120, 7199, 7200, 2 * 86400)] == [
        *("0.0 s", "119.0 s", "2.0 min", "120.0 min", "2.0 h", "2.0 d"),
    ]


def test_a_program_tells_what_it_exchanges(scripts):
    exchanged = scripts("scaling_child").exchanged
    program = """
      %a.1 = f32[32]{0} all-reduce(%x), channel_id=1, to_apply=%sum
      %b = (bf16[3,2]{1,0}, f32[]) all-reduce(%y, %a.1), channel_id=2
      %c = f32[32]{0} fusion(%a.1, %all-reduce.7), kind=kLoop
      %d = pred[] all-gather(%z), channel_id=3
      ROOT %e = f32[5]{0} add(%all-reduce.8, %c)
    """
    assert exchanged(program) == [128, 16, 1]


def test_steps_are_timed_between_visits_of_one_round(scripts):
    child = scripts("scaling_child")
    told = [(0, 2, 9.0, 1.0), (0, 4, 10.0, 2.0), (0, 6, 14.0, 5.0)]  # 0.5 and 2 s a step
    told += [(1, 2, 99.0, 9.0), (1, 4, 101.0, 10.0), (1, 6, 107.0, 14.0)]  # 1 and 3
    visits = [child.Visit(*each) for each in told]
    assert child.step_seconds(visits) == 0.5 + 1
    assert child.busy(visits) == (1 + 3 + 1 + 4) / (1 + 4 + 2 + 6)
    assert child.core_seconds(visits) == (1 + 3 + 1 + 4) / (2 + 2 + 2 + 2)
    again = [child.Visit(0, 6, 0.0, 0.0), child.Visit(0, 2, 5.0, 1.0), child.Visit(0, 4, 6.0, 2.0)]
    assert child.step_seconds(again) == 0.5


def test_two_devices_exchange_what_the_model_says(scripts, nets):
    model, options = nets.stem(), argparse.Namespace(batch=2, steps=1)
    exchanged = scripts("scaling_child").exchanged
    alone, given = scripts("scaling_child").compiled(model, options, 1)
    assert exchanged(alone.as_text()) == []
    state, metrics = alone(given)
    assert (int(state.step), metrics["loss"].shape) == (1, (1,))
    both, _ = scripts("scaling_child").compiled(model, options, 2)
    work = scripts("scaling_model").work_of(model, 4 + 5, 2)
    beyond = sum(exchanged(both.as_text())) - work.reduced_bytes
    assert 0 <= beyond <= 16  # the loss and whether all is finite


@pytest.mark.slow
@pytest.mark.torch
def test_the_cost_model_agrees_with_the_compiler():
    pytest.importorskip("torch")
    small = ("--batch", 4, "--steps", 1, "--chip-batch", 10)
    found = json.loads(run("scaling", "--networks", "", "--model", "resnet20", *small, "--json"))
    rows = {row["table"]: row for row in found["rows"]}
    cost = rows["scaling_model"]
    assert cost["mmacs"] == pytest.approx(40.55, abs=0.01)  # He et al. 2016; without the head 40.5
    assert cost["xla_gflop"] == pytest.approx(cost["gflop"], rel=0.1)
    assert cost["xla_mb"] == pytest.approx(cost["all_mb"], rel=0.15)
    assert cost["program_kb"] == pytest.approx(cost["together_kb"], rel=0.01)
    assert 0.4 * cost["fused_mb"] < cost["half_mb"] < 0.6 * cost["fused_mb"]
    assert rows["scaling_cpu"]["ratio"] > 0.3
    assert rows["scaling_fixed"]["compile_s"] > 0
    assert rows["scaling_pod"]["chips"] == 256
    assert rows["scaling_rates"]["TPU v5p"] > rows["scaling_rates"]["TPU v5e"] > 0


@pytest.mark.slow
@pytest.mark.torch
def test_scaling_of_a_small_run():
    pytest.importorskip("torch")
    small = ("--batch", 2, "--steps", 4, "--chunk", 1, "--devices", "1,2", "--local", 2)
    found = json.loads(run("scaling", "--networks", "resnet20", "--model", "", *small, "--json"))
    rows = {row["mode"]: row for row in found["rows"]}
    assert list(rows) == ["one device", "apart", "together", "processes", "jax.distributed"]
    assert [rows[m]["difference"] for m in ("apart", "processes", "jax.distributed")] == [0, 0, 0]
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["apart"]["alone_ms"] / rows["apart"]["step_ms"] == rows["apart"]["against_alone"]
    assert rows["jax.distributed"]["devices"] == "2 x 2"
