"""The Python API: what `import dfq_jax as dfq` offers."""

import dataclasses
import inspect
import io
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import PIL.Image
import pytest

import dfq_jax as dfq
from dfq_jax.api import quantize as quantizing
from dfq_jax.api import synthesize as imaging
from dfq_jax.api import verdict
from dfq_jax.errors import DataError, DivergedError, UnsupportedModelError, UsageError
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.optim.progress import Watcher
from dfq_jax.recipes import expense
from dfq_jax.recipes.noise import NO_STATISTICS, NOISE_CHOSEN
from dfq_jax.recipes.presets import METHODS, ImageBudget, image_budget
from dfq_jax.synthesis.terms.estimates import ESTIMATED, ESTIMATED_ANEW


@pytest.fixture(scope="module")
def model(checkpoints, made):
    with checkpoints.registered():
        return dfq.load(made / "net.safetensors", arch="small")


@pytest.fixture(scope="module")
def images(made):
    return load_images(made / "images.npz")


@pytest.fixture(scope="module")
def result(model, images):
    return dfq.quantize(model, images)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(10):
            file = path.with_name(f"{index}.png")
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
            archive.write(file, f"{index % 5}/{index}.png")
    return path


def test_everything_public_is_there_and_explained():
    assert sorted(dfq.__all__) == dfq.__all__
    for name in dfq.__all__:
        assert inspect.getdoc(getattr(dfq, name)), name
    for name in (
        "load",
        "predict",
        "synthesize",
        "synthesize_set",
        "quantize",
        "evaluate",
        "verify",
        "export",
    ):
        assert name in dfq.__all__


def test_predict_is_the_network(model, images, nets):
    found = dfq.predict(model, images.images)
    wanted = nets.forward(model, images.images)["fc"]
    assert found.shape == (8, 5)
    assert np.abs(np.asarray(found) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_five_lines(model, images, made, tmp_path):
    """Loading and quantizing in Python gives the files that the command line wrote."""
    result = dfq.quantize(model, images, scheme="w8a8")
    manifest = result.save(tmp_path / "out")
    assert manifest["status"] == "ok"
    assert manifest["source"] == {}
    for name in ("model.onnx", "float.onnx", "model.safetensors", "probe.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (made / "out" / name).read_bytes()
    again, first = dfq.verify(tmp_path / "out"), result.verify()
    assert again.passed
    assert again.layers == first.layers
    assert again.outputs[0].differences == pytest.approx(first.outputs[0].differences, abs=1e-3)
    assert again.outputs[0].noise == pytest.approx(first.outputs[0].noise, rel=1e-3)
    assert result.contract == model.contract


def test_synthesis_tells_where_images_come_from(model):
    seen = []
    found = dfq.synthesize(
        model, n=3, method="zeroq", seed=7, steps=2, batch=2, watch=Watcher(progress=seen.append)
    )
    assert found.images.shape == (3, 8, 8, 3)
    assert found.contract == model.contract
    facts = json.loads(json.dumps(found.provenance))
    assert set(facts) == {
        *("method", "settings", "steps", "batch", "n", "seed", "weights_sha256", "size"),
        *("versions", "device", "dtype", "together", "final_losses", "excluded", "seconds"),
        *("compile_seconds", "natural"),
    }
    assert facts["natural"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    assert [facts[k] for k in ("method", "steps", "batch", "n", "seed")] == ["zeroq", 2, 2, 3, 7]
    assert facts["size"] == [8, 8, 3]
    assert [(p.batch, p.batches, p.step, p.steps) for p in seen] == [(0, 2, 2, 2), (1, 2, 2, 2)]
    assert seen[-1].parts["loss"] == facts["final_losses"][-1]
    again = dfq.synthesize(model, n=3, method="zeroq", seed=7, steps=2, batch=2)
    np.testing.assert_array_equal(again.images, found.images)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n": 0}, "n >= 1, got 0"),
        ({"method": "magic"}, "method 'magic' is none of best, best_unl.*, noise"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": -3}, "batch must be at least 1"),
        ({"seed": -1}, "a seed must be 0..4294967295, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
        ({"dtype": "float16"}, "dtype 'float16' is none of float32, bfloat16"),
    ],
)
def test_senseless_synthesis(model, how, message):
    with pytest.raises(UsageError, match=message):
        dfq.synthesize(model, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scheme": "int8"}, "scheme 'int8' is not"),
        ({"rules": [dfq.Rule("nothing", weight_bits=4)]}, "nothing"),
        ({"seed": -1}, "a seed must be"),
    ],
)
def test_senseless_quantization(model, images, how, message):
    with pytest.raises(UsageError, match=message):
        dfq.quantize(model, images, **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 16}, "made for height 16, the network reads 8"),
        ({"width": 4}, "made for width 4, the network reads 8"),
        ({"mean": (0.5,) * 3}, r"made for mean \(0.5, 0.5, 0.5\), the network reads \(0.485"),
        ({"std": (0.5,) * 3}, r"made for std \(0.5, 0.5, 0.5\)"),
    ],
)
def test_images_of_another_contract_are_refused(model, change, message):
    contract = dataclasses.replace(model.contract, **change)
    with pytest.raises(UsageError, match=message):
        dfq.quantize(model, dfq.Examples((jnp.zeros((4, *contract.shape)),), (contract,)))


def test_images_that_do_not_keep_to_their_contract_are_refused(model, images):
    """Of another shape than they say, or pixels from 0 to 255."""
    large = dataclasses.replace(images, arrays=(jnp.zeros((4, 16, 16, 3)),))
    with pytest.raises(
        UsageError, match=r"have shape \(16, 16, 3\), the network reads \(8, 8, 3\)"
    ):
        dfq.quantize(model, large)
    pixels = jax.random.randint(jax.random.key(0), (4, 8, 8, 3), 0, 256).astype(jnp.float32)
    with pytest.raises(UsageError, match=r"9\d % of the images' values lie outside \[-2\.\d+, 2\."):
        dfq.quantize(model, dataclasses.replace(images, arrays=(pixels,)))
    broken = jnp.full((4, 8, 8, 3), jnp.nan)
    with pytest.raises(UsageError, match="100 % of"):
        dfq.quantize(model, dataclasses.replace(images, arrays=(broken,)))


def test_without_images_the_preset_makes_them(model, monkeypatch):
    asked, said = [], []

    def made(model, method, n, **how):
        asked.append((n, how | {"method": method}))
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    monkeypatch.setattr(quantizing, "image_budget", lambda *_, **__: ImageBudget("zeroq", 8, 5))
    given: tuple[dict[str, Any], ...] = ({}, {"n": 6}, {"steps": 4}, {"method": "best"})
    for how in (*given, {"method": "dsg", "n": 9}):
        with pytest.raises(DivergedError, match="stop here"):
            dfq.quantize(model, **how, seed=3, watch=Watcher(said.append))
    assert [(n, how["method"], how["steps"], how["seed"]) for n, how in asked] == [
        (8, "zeroq", 5, 3),
        (6, "zeroq", 5, 3),
        (8, "zeroq", 4, 3),
        (256, "best", 200, 3),
        (9, "dsg", 500, 3),
    ]
    assert said[0] == "synthesizing 8 images (zeroq)"
    assert said[-2:] == [
        "synthesizing 9 images (dsg)",
        "  3 batches of 4 images, 500 steps each; published are 4 images in 500 steps",
    ]
    assert said[6] == "  4 batches of 64 images, 200 steps each"


@pytest.mark.parametrize(
    ("method", "n", "steps"),
    [("genie", 1024, 4000), ("zeroq", 32, 500), ("intraq", 5120, 1000), ("mct", 1024, 1000)],
)
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_method_by_name_makes_what_its_paper_has(model, monkeypatch, method, n, steps, preset):
    """Whatever the preset has; told beforehand with the time it takes."""
    asked, said = [], []

    def made(model, method, n, **how):
        asked.append((n, method, how["steps"]))
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    monkeypatch.setattr(expense, "LONG", 0.0)
    with pytest.raises(DivergedError, match="stop here"):
        dfq.quantize(model, method=method, preset=preset, watch=Watcher(said.append))
    assert asked == [(n, method, steps)]
    assert said[0] == f"synthesizing {n} images ({method})"
    assert f"{steps:,} steps" in said[1]
    assert "as published; roughly " in said[1]
    assert said[1].endswith(" on this machine, less with smaller `n=` and `steps=`")


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_rounding_by_name_learns_from_as_many_images_as_best_makes(model, monkeypatch, preset):
    asked, said = [], []

    def made(model, method, n, **how):
        asked.append((method, n, how["steps"]))
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    roundings: tuple[dict[str, Any], ...] = tuple(
        {"reconstruction": name} for name in ("qdrop", "nearest")
    )
    for named in roundings:
        with pytest.raises(DivergedError, match="stop here"):
            dfq.quantize(model, preset=preset, **named, watch=Watcher(said.append))
    best, own = (image_budget(p, model.contract, learned=True) for p in ("best", preset))
    assert asked == [("best_unlabelled", best.n, best.steps), ("best", own.n, own.steps)]
    assert said[1] == "  as many as preset best makes, since qdrop learns from them"
    assert len(said) == 3


def test_synthesize_makes_as_many_images_as_quantize(model, monkeypatch):
    """Of every method that is named, in as many steps."""
    asked, ordered = [], []

    def made(model, method, n, **how):
        asked.append((method, n, how["steps"]))
        raise DivergedError("stop here")

    def begun(model, recipe, n, *rest, **how):
        ordered.append((recipe.name, n, recipe.steps))
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    monkeypatch.setattr(imaging, "synthesize_images", begun)
    for name in (m for m in METHODS if m not in ("noise", "psaq_vit", "sardfq", "gzsq")):
        for make in (dfq.quantize, dfq.synthesize):
            with pytest.raises(DivergedError, match="stop here"):
                make(model, method=name)
    assert asked == ordered
    assert ("dsg", 4, 500) in asked


def test_reconstructions_by_name(model, images, tmp_path):
    """Closed form for `balanced`; each unit is reported."""
    told = []
    tell = lambda index, units, report: told.append((index, units, report.method))
    found = dfq.quantize(model, images, scheme="w3a8", preset="balanced", watch=Watcher(unit=tell))
    units = found.report.units
    assert units
    assert {unit.method for unit in units} == {"closed_form"}
    assert told == [(i, len(units), "closed_form") for i in range(len(units))]
    assert found.settings["reconstruction"] == "closed_form"
    assert sum(u.after for u in units) < sum(u.before for u in units)
    plain = dfq.quantize(model, images, scheme="w3a8")
    assert plain.report.units == ()
    assert found.report.sqnr > plain.report.sqnr + 1
    manifest = found.save(tmp_path / "out")
    assert [u["name"] for u in manifest["report"]["units"]] == [u.name for u in units]
    assert "Learned rounding" in (tmp_path / "out" / "report.html").read_text()
    assert dfq.verify(tmp_path / "out").most_steps <= 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"reconstruction": "brec"}, "reconstruction 'brec' is none of nearest.*nearest: brecq"),
        ({"reconstruction_steps": 5}, "'nearest' takes no steps"),
        ({"reconstruction": "qdrop", "reconstruction_steps": 0}, "takes steps >= 1, got 0"),
        ({"observer": "lpp"}, "observer 'lpp' is none of .*nearest: lp"),
        ({"budget": "4.5"}, "4.5"),
        ({"budget": "0.1bits"}, "0.1bits"),
        ({"method": "magic"}, "method 'magic' is none of best"),
        ({"n": 5}, "n is of images that are made, and some were given: leave it out"),
        ({"steps": 5}, "steps is of images that are made"),
        ({"schem": "w4a4"}, "setting 'schem' is none of scheme.*nearest: scheme"),
        ({"method": "dsg"}, "method 'dsg' makes images, and some were given: leave one out"),
    ],
)
def test_unknown_ways_are_refused(model, images, how, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        dfq.quantize(model, images, **how)


def test_bits_within_a_budget(model, images, tmp_path):
    """Never more than allowed; as rules, so what is deployed is what was chosen."""
    said = []
    found = dfq.quantize(model, images, scheme="w4a8", budget="4.6bits", watch=Watcher(said.append))
    assert found.mixed is not None
    assert found.report.average_bits <= 4.6
    assert found.mixed.chosen.cost.amount <= 4.6
    assert "allocating bits" in said
    pairs = zip(found.mixed.space.choices, found.mixed.chosen.bits, strict=True)
    chosen = {choice.name: bits for choice, bits in pairs}
    shown = {x.name: x.weight_bits for x in found.report.layers}
    assert chosen.items() <= shown.items()
    manifest = found.save(tmp_path / "out")
    assert manifest["report"]["mixed"]["chosen"]["bits"] == list(found.mixed.chosen.bits)
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert dfq.verify(tmp_path / "out").most_steps <= 1


def test_observers_by_name(model, images):
    """Extremes make wider grids than the search."""
    width = lambda how: sum(
        float(a.scale)
        for site, a in dfq.quantize(model, images, scheme="w8a4", **how).quantized.affines.items()
        if site.argument is not None
    )
    assert width({"observer": "min_max"}) > 1.05 * width({"observer": "omse"})


def test_a_network_without_statistics_gets_noise(nets):
    """Whatever method is asked for; with an explanation, and less confidence."""
    model, said = nets.vit(), []
    images = dfq.synthesize(model, n=6, method="zeroq", steps=3, seed=2)
    assert (images.provenance["method"], images.provenance["steps"]) == ("noise", 0)
    assert images.provenance["final_losses"] == []
    assert images.provenance["notes"] == [NO_STATISTICS]
    json.dumps(dict(images.provenance))
    again = dfq.synthesize(model, n=6, seed=2)
    np.testing.assert_array_equal(again.images, images.images)
    result = dfq.quantize(model, seed=2, watch=Watcher(said.append))
    assert said[:2] == ["synthesizing 64 images (noise)", NO_STATISTICS]
    assert result.settings["images"] == "64 (noise)"
    assert result.settings["held out"] == 16
    assert (result.report.confidence, result.report.notes) == ("low", (NO_STATISTICS,))
    assert result.report.passed
    assert result.report.coverage == 1.0
    data = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    assert (data["confidence"], data["notes"]) == ("low", [NO_STATISTICS])


def test_noise_by_request(model):
    images = dfq.synthesize(model, n=8, method="noise")
    assert "notes" not in images.provenance
    result = dfq.quantize(model, images)
    assert (result.report.confidence, result.report.notes[0]) == ("low", NOISE_CHOSEN)
    assert "the 8 images you gave only judge the result" in result.report.notes[1]


def test_estimated_statistics_by_request(nets, model):
    """A network without batch norm, by name; judged with little confidence, as it should be."""
    bare, said = nets.convnext(), []
    result = dfq.quantize(bare, method="gzsq", n=8, steps=3, seed=2, watch=Watcher(said.append))
    assert said[0] == "synthesizing 8 images (gzsq)"
    assert said[2] == ESTIMATED
    how = "one batch of 8 images, 3 steps; published are 32 images in 500 steps"
    assert said[1].strip() == result.settings["synthesis"] == how
    facts = result.images.provenance
    assert (facts["method"], facts["notes"]) == ("gzsq", [ESTIMATED])
    assert (facts["steps"], len(facts["final_losses"])) == (3, 1)
    assert (result.report.confidence, result.report.notes) == ("low", (ESTIMATED,))
    assert result.float_model is bare
    with_norms = dfq.synthesize(model, n=2, method="gzsq", steps=2)
    assert with_norms.provenance["notes"] == [ESTIMATED_ANEW]
    plain = dfq.synthesize(model, n=2, method="zeroq", steps=2).provenance
    assert with_norms.provenance["weights_sha256"] == plain["weights_sha256"]


def test_attention_needs_no_statistics(nets, model):
    images = dfq.synthesize(nets.vit(), n=2, method="psaq_vit", steps=2)
    assert images.provenance["method"] == "psaq_vit"
    assert "notes" not in images.provenance
    assert len(images.provenance["final_losses"]) == 1
    with pytest.raises(UnsupportedModelError, match="attention"):
        dfq.synthesize(model, n=2, method="psaq_vit", steps=2)


@pytest.mark.parametrize("name", ["unet", "two_heads"])
def test_networks_that_are_no_classifiers(name, nets, monkeypatch):
    monkeypatch.setattr(quantizing, "image_budget", lambda *_, **__: ImageBudget("best", 8, 3))
    monkeypatch.delattr(verdict, "probes_of")
    result = dfq.quantize(getattr(nets, name)(), scheme="w8a8")
    (note,) = result.report.notes
    assert note.startswith("no class labels: the network's output is ")
    assert result.report.confidence == "usual"
    assert result.report.dense is (name == "unet")
    assert (result.report.estimate, result.judges) == (None, None)


def test_the_report_and_settings_of_a_result(result):
    assert result.report.passed
    assert result.report.coverage == 1.0
    assert result.settings["scheme"] == "w8a8"
    assert result.settings["preset"] == "fast"
    assert result.settings["layers"] == "qdrop_8bit_ends"
    assert result.settings["images"] == "8 (zeroq)"
    assert len(result.probes) == result.report.images
    json.dumps(dict(result.settings))


@pytest.mark.onnx
def test_a_result_verifies_itself(result):
    found = result.verify()
    assert found.passed
    assert found.images == min(16, len(result.probes))
    with np.load(io.BytesIO(result.probe_bytes)) as saved:
        assert saved["pixels"].dtype == np.uint8


@pytest.mark.onnx
def test_export(model, result, images, tmp_path):
    float_file, int_file = tmp_path / "float.onnx", tmp_path / "int.onnx"
    dfq.export(model, float_file)
    dfq.export(result.quantized, int_file)
    wanted = np.asarray(dfq.predict(model, images.images))
    scores = run(open_session(float_file, optimize=True), images.images)
    assert np.abs(scores - wanted).max() <= 1e-5 * np.abs(wanted).max()
    operators = {n.op_type for n in onnx.load(int_file).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    scores = run(open_session(int_file, optimize=False), images.images)
    assert np.abs(scores - wanted).max() <= 0.2 * np.abs(wanted).max()


@pytest.mark.onnx
def test_evaluate(model, made, data):
    seen = []
    found = dfq.evaluate(model, str(data), batch=4, on_batch=lambda *at: seen.append(at[:2]))
    assert (found.n, found.top5) == (10, 1.0)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert dfq.evaluate(made / "out" / "float.onnx", str(data)) == found
    whole = dfq.evaluate(str(made / "out"), str(data))
    assert dfq.evaluate(made / "out" / "model.onnx", str(data)) == whole
    assert dfq.evaluate(model, str(data), limit=5).n == 5


def test_evaluate_needs_to_know_the_normalisation(made, data, tmp_path):
    proto = onnx.load(made / "out" / "float.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(DataError, match=r"bare\.onnx does not say how its input is normalised"):
        dfq.evaluate(tmp_path / "bare.onnx", str(data))


def test_verify_needs_probes(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    manifest = json.loads((made / "out" / "manifest.json").read_text())
    del manifest["files"]["probe.npz"]
    for name in manifest["files"]:
        (out / name).write_bytes((made / "out" / name).read_bytes())
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"probe\.npz does not hold the images to verify with"):
        dfq.verify(out)


@pytest.mark.onnx
def test_bench(made):
    found = dfq.bench(made / "out", runs=2)
    assert found.runs == 2
    assert found.speedup == pytest.approx(found.float_ms / found.int_ms)
    with pytest.raises(UsageError, match="runs >= 1"):
        dfq.bench(made / "out", runs=0)


def test_errors_have_one_parent():
    for kind in (DataError, DivergedError, UnsupportedModelError, UsageError):
        assert issubclass(kind, dfq.DfqError)
    with pytest.raises(dfq.DfqError, match="there is no file"):
        dfq.load("none.pth")


def test_the_real_network_from_its_checkpoint(resnet20, shared):
    loaded = dfq.load(shared / "checkpoints" / "resnet20-cifar10-jpeg.pth", arch="resnet20_cifar")
    assert loaded.graph == resnet20.model.graph
    text = dfq.describe(loaded)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["images", "input", "32x32x3"]
    assert ["linear", "Linear", "10", "<-", "avg_pool"] in lines
