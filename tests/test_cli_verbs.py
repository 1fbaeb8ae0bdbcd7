"""What every verb of the command line does, shows, and writes as JSON."""

import dataclasses
import importlib
import json
import re
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import onnx
import PIL.Image
import pytest
from plain_text import plain

from dfq_jax.api import quantize as quantizing
from dfq_jax.api import result
from dfq_jax.api import synthesize as imaging
from dfq_jax.base.parallel import HERE
from dfq_jax.errors import DataError
from dfq_jax.examples import Examples
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.optim.progress import Progress
from dfq_jax.recipes.presets import ImageBudget
from dfq_jax.report.terminal import LAYER_HEADER


@pytest.fixture
def net(made):
    """The arguments that name the network."""
    return made / "net.safetensors", "--arch", "small"


@pytest.fixture(scope="module")
def image_nets():
    """The module `tests/io/image_nets.py`."""
    return importlib.import_module("image_nets")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 images in 5 class folders, and a zip archive of them."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for index in range(20):
            path = root / "images" / f"class {index % 5}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
            archive.write(path, path.relative_to(root / "images"))
    return root


# inspect


def test_inspect(dfq, net):
    found = plain(dfq("inspect", *net))
    assert found.code == 0
    lines = found.out.splitlines()
    words = [line.split() for line in lines]
    assert words[0] == ["images", "input", "8x8x3"]
    assert words[1][:3] == ["conv1", "Conv2d(3x3,", "padding=1)"]
    assert words[15] == ["fc", "Linear", "5", "<-", "pool"]
    assert lines[16] == "returns fc"
    assert "1,425 values, 36,412 multiply-accumulates an image" in lines
    assert "4 of 4 batch norms usable for synthesis" in found.out
    assert "input 8x8 RGB, (pixel/255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)" in found.out
    assert "read net.safetensors as small" in found.err


def test_inspect_json(dfq, net):
    found = dfq("inspect", *net, "--size", 16, "--json")
    assert set(found.data) == {
        *("architecture", "source", "sha256", "values", "macs", "nodes", "batch_norms"),
        *("usable_batch_norms", "contract", "notes"),
    }
    assert found.data["architecture"] == "small"
    assert found.data["source"] == "net.safetensors"
    assert (found.data["contract"]["height"], found.data["contract"]["width"]) == (16, 16)
    assert "read net.safetensors" in found.err


def test_inspect_of_channels_last_and_of_two_sides(dfq, image_nets, tmp_path):
    net = image_nets.classifier(("n", "rows", "columns", 3))
    onnx.save(net, tmp_path / "net.onnx")
    found = dfq("inspect", tmp_path / "net.onnx", "--size", "12x20", "--json")
    contract = found.data["contract"]
    assert (contract["height"], contract["width"], contract["layout"]) == (12, 20, "NHWC")
    assert contract["names"] == ["n", "rows", "columns"]
    shown = dfq("inspect", tmp_path / "net.onnx", "--size", "12x20", "--layout", "nhwc")
    assert "input 12x20 RGB" in shown.out
    assert "files read NHWC" in shown.out
    assert dfq("inspect", tmp_path / "net.onnx", "--size", "12by20").code == 2


# synthesize


def test_synthesize(dfq, net, tmp_path):
    out, preview = tmp_path / "bilder ü.npz", tmp_path / "grid.png"
    how = ("-n", 3, "--steps", 2, "--batch", 2, "--method", "zeroq", "--seed", 5, "--size", 10)
    found = plain(dfq("synthesize", *net, "-o", out, *how, "--preview", preview))
    assert found.code == 0
    assert re.fullmatch(
        r"3 images by zeroq in [\d.]+ s \([\d.]+ s compiling\): .*bilder ü\.npz\n", found.out
    )
    assert {p.name for p in tmp_path.iterdir()} == {out.name, f"{out.name}.toml", preview.name}
    images = load_images(out)
    assert images.images.shape == (3, 10, 10, 3)
    with PIL.Image.open(preview) as picture:
        assert picture.format == "PNG"
    with np.load(out, allow_pickle=False) as raw:
        assert raw["images"].dtype == np.float32
    facts = dict(images.provenance)
    assert [facts[k] for k in ("method", "steps", "batch", "n", "seed")] == ["zeroq", 2, 2, 3, 5]
    assert len(facts["final_losses"]) == 2
    assert facts["excluded"] == []


def test_synthesize_json_and_defaults(dfq, net, monkeypatch, tmp_path):
    asked = []

    def made(model, method, n, *, watch, **options):
        asked.append((method, n, options))
        watch.says("a step takes little")
        watch.advances(Progress(0, 1, 2, 2, {"loss": 0.5}))
        shape = (n, *model.contract.shape)
        return Examples((jnp.zeros(shape),), model.inputs, {"method": "dsg", "seconds": 1.5})

    monkeypatch.setattr(imaging, "synthesize", made)
    out = tmp_path / "i.npz"
    found = plain(dfq("synthesize", *net, "--output", out, "--json"))
    assert found.data == {
        "images": str(out),
        "n": 256,
        "provenance": {"method": "dsg", "seconds": 1.5},
    }
    assert found.data["provenance"] == load_images(out).provenance
    assert "synthesizing 2/2 steps: loss 0.5" in found.err
    assert asked.pop() == (
        "best",
        256,
        {
            **{"seed": 0, "steps": None, "batch": None},
            **{"machine": HERE, "state_folder": tmp_path / ".i.npz.run"},
        },
    )


# quantize


def test_quantize_shows_what_was_done_and_how_far_to_trust_it(dfq, net, made, tmp_path):
    images, out = made / "images.npz", tmp_path / "out"
    found = plain(dfq("quantize", *net, "-o", out, "--images", images))
    assert found.code == 0
    lines = found.out.splitlines()
    assert re.split("  +", lines[0]) == list(LAYER_HEADER)
    assert lines[1].split()[:6] == ["conv1", "Conv2d", "8/8", "38.0", "%", "216"]
    assert "small w8a8, layers qdrop_8bit_ends" in lines
    assert lines[8].startswith("quantized 5/5 layers (100.0 % of MACs, 100.0 % of weights")
    assert re.search(r"^on disk 0\.01 MB -> 0\.01 MB \([\d.]+ %\)$", found.out, re.M)
    assert re.search(r"^agreement with the float network [\d.]+ % of \d held-out", found.out, re.M)
    assert "(not an accuracy)" in found.out
    assert "verified against ONNX Runtime" in found.out
    assert lines[-1] == f"saved: {out / 'model.onnx'}"
    assert {p.name for p in out.iterdir()} == {
        *("model.onnx", "float.onnx", "model.safetensors", "report.html", "manifest.json"),
        *("probe.npz", "config.toml", "run.py"),
    }
    assert re.search(
        r"^in ONNX Runtime [\d.]+ here, one thread: .*x as (fast|SLOW)$", found.out, re.M
    )
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    for stage in ("folding batch norms", "calibrating", "correcting", "judging", "verifying"):
        assert stage in found.err


def test_quantize_json_and_the_same_bytes_every_time(dfq, net, made, tmp_path):
    out = tmp_path / "a folder" / "größe"
    found = dfq("quantize", *net, "-o", out, "--images", made / "images.npz", "--json")
    assert set(found.data) == {
        *("status", "out", "model", "scheme", "layers", "bytes_float", "bytes_int", "report"),
        *("seconds", "store", "speedup"),
    }
    assert found.data["status"] == "ok"
    assert found.data["store"] == "packed"
    assert found.data["speedup"] == found.data["report"]["latency"]["speedup"] > 0
    assert found.data["model"] == str(out / "model.onnx")
    assert found.data["bytes_int"] == (out / "model.onnx").stat().st_size
    assert found.data["bytes_float"] == (out / "float.onnx").stat().st_size
    assert found.data["report"]["verification"]["passed"] is True
    for name in ("model.onnx", "float.onnx", "model.safetensors", "probe.npz", "report.html"):
        assert (out / name).read_bytes() == (made / "out" / name).read_bytes()
    manifest = load_artifact(out).manifest
    assert manifest["source"]["name"] == "net.safetensors"
    assert manifest["source"]["architecture"] == "small"
    assert len(manifest["source"]["sha256"]) == 64
    assert (manifest["preset"], manifest["seed"]) == ("fast", 0)
    assert manifest["images"]["method"] == "zeroq"
    assert manifest["report"] == found.data["report"]


def test_presets_make_their_own_images(dfq, net, monkeypatch, tmp_path):
    asked = []

    def budget(preset, contract, *, learned):
        asked.append((preset, contract.shape, learned))
        return ImageBudget("zeroq", 8, 2)

    monkeypatch.setattr(quantizing, "image_budget", budget)
    out = tmp_path / "out"
    found = dfq("quantize", *net, "-o", out, "--preset", "balanced", "--seed", 3, "--json")
    manifest = load_artifact(out).manifest
    assert asked == [("balanced", (8, 8, 3), True)]
    assert "synthesizing 8 images (zeroq)" in found.err
    assert (manifest["preset"], manifest["seed"]) == ("balanced", 3)
    assert found.data["status"] == manifest["status"] == "ok"
    assert [manifest["images"][k] for k in ("method", "n", "steps", "seed")] == ["zeroq", 8, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_learned_rounding_and_budgets(dfq, net, made, tmp_path):
    """Every unit is told of on the way, and all of them in a line at the end."""
    given = ("--images", made / "images.npz", "--scheme", "w4a8", "--preset", "balanced")
    found = dfq("quantize", *net, "-o", tmp_path / "out", *given, "--budget", "4.6bits")
    assert "unit 1/" in found.err
    assert "closed_form: errors of" in found.out
    assert "bits by layer" in found.out
    assert "best allocations" in found.out
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_without_onnx_runtime_the_reference_evaluator_verifies(
    dfq, net, made, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = ("quantize", *net, "-o", tmp_path / "out", "--images", made / "images.npz")
    found = dfq(*line, "--json")
    verification = found.data["report"]["verification"]
    assert verification["passed"] is True
    assert verification["runner"] == "the ONNX reference evaluator"
    assert "pip install dfq-jax[runtime]" in found.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "largest difference to the ONNX reference evaluator" in page
    shown = plain(dfq("verify", tmp_path / "out"))
    assert shown.code == 0
    assert shown.out.startswith("against the ONNX reference evaluator, optimisations off\n")
    assert "\nverified against the ONNX reference evaluator" in shown.out
    gone = dfq("bench", tmp_path / "out")
    assert (gone.code, gone.out) == (2, "")
    assert "pip install dfq-jax[runtime]" in gone.err


def test_a_file_that_computes_something_else_fails(dfq, net, made, monkeypatch, tmp_path):
    real = result.compare_runtimes

    def apart(*given, **how):
        found = real(*given, **how)
        return dataclasses.replace(found, failures=("output 'logits' is 9 steps apart",))

    monkeypatch.setattr(result, "compare_runtimes", apart)
    found = dfq("quantize", *net, "-o", tmp_path / "out", "--images", made / "images.npz")
    assert found.code == 4
    assert "NOT VERIFIED" in found.out
    assert "the file did not verify: output 'logits' is 9 steps apart. Saved as" in found.err
    assert (tmp_path / "out" / "model.failed.onnx").exists()
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_what_nothing_runs_is_saved_unverified(dfq, net, made, monkeypatch, tmp_path):
    def unable(*_):
        raise RuntimeError("no implementation")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("dfq_jax.io.verification.runners.ReferenceEvaluator", unable)
    line = ("quantize", *net, "-o", tmp_path / "out", "--images", made / "images.npz")
    found = dfq(*line, "--json")
    assert found.data["report"]["verification"] is None
    assert "not verified: this needs ONNX Runtime" in found.err
    assert "no implementation" in found.err
    gone = dfq("verify", tmp_path / "out")
    assert (gone.code, gone.out) == (3, "")
    assert "pip install dfq-jax[runtime]" in gone.err


@pytest.mark.parametrize("fault", ["a file of another network", "sums too long", "a bug"])
def test_whatever_goes_wrong_in_verification_the_result_is_kept(
    dfq, net, made, monkeypatch, tmp_path, fault
):
    error = DataError("the ONNX file quantizes 3 tensors") if "file" in fault else ValueError(fault)

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(result, "compare_runtimes", broken)
    line = ("quantize", *net, "-o", tmp_path / "out", "--images", made / "images.npz")
    found = dfq(*line, "--json")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["report"]["verification"] is None
    if "file" in fault:
        assert found.code == 4
        assert "the file did not verify: the ONNX file quantizes 3 tensors" in found.err
        assert (tmp_path / "out" / "model.failed.onnx").exists()
        assert manifest["report"]["unverified"] == str(error)
        return
    assert found.code == 0
    assert f"not verified: ValueError: {fault}" in found.err
    assert manifest["report"]["unverified"] == f"ValueError: {fault}"
    assert (tmp_path / "out" / "model.onnx").exists()


# evaluate, verify, bench


@pytest.mark.onnx
def test_evaluate_runs_networks_folders_and_files(dfq, net, made, data):
    images = ("--data", data / "images", "--json")
    found = dfq("evaluate", *net, *images).data
    assert set(found) == {"top1", "top5", "n"}
    assert (found["n"], found["top5"]) == (20, 1.0)
    assert 0 <= found["top1"] <= 1
    assert dfq("evaluate", made / "out" / "float.onnx", *images).data == found
    whole = dfq("evaluate", made / "out", *images).data
    assert whole == dfq("evaluate", made / "out" / "model.onnx", *images).data
    assert whole == dfq("evaluate", made / "out", "--data", data / "images.zip", "--json").data
    assert abs(whole["top1"] - found["top1"]) <= 0.1
    assert dfq("evaluate", made / "out", *images, "--limit", 7).data["n"] == 7
    said = plain(dfq("evaluate", made / "out", "--data", data / "images.zip"))
    assert said.out == f"top-1 {100 * whole['top1']:.2f} %, top-5 100.00 % of 20\n"


def test_evaluate_of_a_file_that_says_nothing_runs_in_jax(dfq, image_nets, data, tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(image_nets.classifier((1, 8, 8, 3)), path)
    found = plain(dfq("evaluate", path, "--data", data / "images", "--mean", 0.5, "--std", 0.5))
    assert "of 20" in found.out
    assert "channels last (NHWC)" in found.err


def test_evaluate_refuses_files_and_data_that_do_not_fit(dfq, net, made, data, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    (tmp_path / "one" / "only").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "one" / "only" / "a.png")
    for model, where, message in (
        ([tmp_path / "net.onnx"], data / "images", "cannot read"),
        ([tmp_path / "none.onnx"], data / "images", "there is no file"),
        (net, tmp_path / "one", "network has 5 outputs"),
        (net, made / "net.safetensors", "neither a folder nor a readable zip archive"),
        (net, "tfds:no_such_data_set", "no_such_data_set"),
    ):
        found = dfq("evaluate", *model, "--data", where)
        assert (found.code, found.out) == (2, ""), found.err
        assert message in found.err
    assert dfq("evaluate", *net, "--data", data / "images", "--limit", 0).code == 2


@pytest.mark.onnx
def test_verify(dfq, made):
    found = plain(dfq("verify", made / "out"))
    assert found.code == 0
    assert found.out.startswith("against ONNX Runtime, optimisations off\ntensor ")
    assert re.search(r"^fc +onnxruntime on +[\d.]+ ", found.out, re.M)
    assert re.search(
        r"^  outputs: within [\d.]+ times the noise that rounding adds$", found.out, re.M
    )
    assert "\nverified against ONNX Runtime" in found.out
    data = dfq("verify", made / "out", "--json").data
    assert {"passed", "most_steps", "agreement", "layers", "ends", "images"} <= set(data)
    assert data["passed"] is True
    assert data["most_steps"] <= 1
    assert 2 <= data["images"] <= 8
    runners = [e["runner"] for e in data["ends"]]
    assert runners[:3] == ["integer", "onnxruntime off", "onnxruntime on"]
    assert {"outputs", "failures", "undecided", "warnings", "runner", "runtime"} <= set(data)
    assert data["failures"] == []
    (output,) = data["outputs"]
    assert (output["name"], output["kind"], output["images"]) == ("fc", "classes", data["images"])
    assert set(output["differences"]) == set(runners)
    assert max(output["differences"].values()) < 20


@pytest.mark.onnx
def test_bench(dfq, made):
    found = plain(dfq("bench", made / "out", "--runs", 2))
    assert found.code == 0
    assert re.search(r"^float32 +[\d.]+\nw8a8 +[\d.]+\n", found.out, re.M)
    assert re.search(r"the integer network is [\d.]+x as fast", found.out)
    data = dfq("bench", made / "out", "--runs", 2, "--json").data
    assert {"float_ms", "int_ms", "speedup", "batch", "threads", "runs", "runtime"} <= set(data)
    assert (data["batch"], data["runs"]) == (1, 2)
    none = dfq("bench", made / "out", "--runs", 0)
    assert (none.code, none.out) == (2, "")
    assert "runs >= 1" in none.err
