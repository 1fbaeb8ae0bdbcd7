"""`dfq.compress` and `dfq compress`: one run prunes, restores, quantizes, exports and verifies."""

import inspect
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import dfq_jax as dfq
from dfq_jax.allocation.costs import parse_budget
from dfq_jax.api import quantize as quantizing
from dfq_jax.errors import DivergedError, UsageError
from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.artifacts.quantized_tensors import stored_codes
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.numerics.affine import Affine
from dfq_jax.optim.progress import Watcher
from dfq_jax.pruning.groups import Subject
from dfq_jax.quantization.sites import Site
from dfq_jax.recipes.retraining import retraining
from dfq_jax.training.engine import TrainingReport


@pytest.fixture(scope="module")
def images(nets, tiny_net):
    return dfq.Examples((nets.images(tiny_net, 16),), tiny_net.inputs)


@pytest.fixture(scope="module")
def found(tiny_net, images):
    return dfq.compress(tiny_net, images, prune="30%", channels="all", untouched=("conv2",))


def test_what_is_left_is_quantized_and_judged_by_the_original(found, tiny_net, images):
    assert found.pruned is not None
    wide = {x.name: x.outputs for x in found.pruned.layers}
    assert wide["conv1"] == wide["depthwise"] == (6, 4)
    assert wide["conv2"] == (8, 8)
    assert found.float_model.params["conv1"]["kernel"].shape == (3, 3, 3, 4)
    assert found.quantized.model.params["project"]["kernel"].shape == (1, 1, 4, 4)
    exact, small = (
        np.asarray(dfq.predict(m, found.probes.images)) for m in (tiny_net, found.float_model)
    )
    far = np.mean((small - exact) ** 2) / np.mean(exact**2)
    assert found.report.sqnr < -10 * np.log10(far) + 1
    assert found.report.estimate is not None
    assert "30% of all channels by reconstruction, restored by ridge, not conv2" in str(found)
    assert "pruned to" in str(found)


def test_channels_that_hang_together_are_found_once(tiny_net, images, monkeypatch):
    """For the check before any work, for what is pruned, and for what learns from the whole."""
    found: list[Any] = []

    def counted(model):
        found.append(model)
        return coupled_channels(model)

    def untrained(model, *given, **told):
        return model, TrainingReport("lesson", 1, 0.0, 0.0, True, 0.0, 0.0)

    monkeypatch.setattr("dfq_jax.pruning.groups.coupled_channels", counted)
    monkeypatch.setattr("dfq_jax.api.compress.trained_in_float", untrained)
    monkeypatch.setattr("dfq_jax.api.compress.check_images", lambda *_: None)
    dfq.compress(tiny_net, images, prune="30%", train=1)
    assert [model for model in found if model is tiny_net] == [tiny_net]
    subject = Subject(tiny_net)
    known = subject.coupled
    assert subject.showing(images.images).coupled is known
    assert subject.showing(None).images is None


def test_the_folder_tells_both_shapes(found, tmp_path):
    found.save(tmp_path / "out", verification=found.verify())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told = manifest["report"]["pruning"]
    assert told["layers"][0]["shown"] == "Conv2d(6 -> 4)"
    assert told["macs"]["after"] < told["macs"]["before"]
    assert told["left"]["conv2"] == "the pattern conv2 says so"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Conv2d(6 -&gt; 4)" in page
    shapes = {tuple(t.dims) for t in onnx.load(tmp_path / "out" / "float.onnx").graph.initializer}
    assert (4, 3, 3, 3) in shapes
    again = load_artifact(tmp_path / "out")
    assert again.quantized.model.params["conv1"]["kernel"].shape == (3, 3, 3, 4)


def test_restoration_has_enough_images_made(tiny_net, monkeypatch):
    asked = []

    def made(model, method, n, **_):
        asked.append(n)
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    every: tuple[dict[str, Any], ...] = ({}, {"restore": "udfc"}, {"n": 20})
    for how in every:
        with pytest.raises(DivergedError, match="stop here"):
            dfq.compress(tiny_net, **how)
    assert asked[0] == 128
    assert asked[1] < 128
    assert asked[2] == 20


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"prune": "130%"}, "no share of channels"),
        ({"budget": "1% MACs"}, r"budget 1% MACs is out of reach.* takes \d"),
        ({"budget": "50% MACs", "prune": 0.3}, "both say how much"),
        ({"budget": "some"}, "budget 'some' is none of a pruned network"),
        ({"round_to": 0}, "round_to is a number of channels"),
        ({"scheme": "w9a9"}, "w9a9"),
        ({"untouched": ("nothing*",)}, r"'nothing\*' matches no layer"),
        ({"untouched": ("nothing*",), "sparsity": "2:4"}, r"'nothing\*' matches no layer"),
        ({"sparsity": "5:4"}, "pattern '5:4' is none"),
        ({"sparsity": "2:4", "prune": "130%"}, "no share of channels"),
        ({"sparsity": "2:4", "preset": "balanced"}, "'closed_form' would move zeros"),
        ({"sparsity": "2:4", "reconstruction": "squant"}, "'squant' would move zeros"),
        ({"prune": "0%"}, "no share of channels"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"train": 5, "n": 40}, "takes 64 images a step and there are 30"),
        ({"scheme": "float", "reconstruction": "squant"}, "and reconstruction says how to"),
        ({"scheme": "float", "budget": "50% bytes", "bits": "joint"}, "and bits says how to"),
    ],
)
def test_bad_words_are_refused_before_images_are_made(how, told, tiny_net, monkeypatch):
    monkeypatch.delattr(quantizing, "synthesize")
    with pytest.raises(UsageError, match=told):
        dfq.compress(tiny_net, **how)


def test_a_word_that_types_would_refuse_is_refused_without_them(tiny_net, monkeypatch):
    """Of a file, say; `restore` is looked at even where no channel goes."""
    monkeypatch.delattr(quantizing, "synthesize")
    compress = inspect.unwrap(dfq.compress)
    with pytest.raises(UsageError, match="'rigde' is none of"):
        compress(tiny_net, sparsity="2:4", restore="rigde")


@pytest.mark.parametrize(("restore", "judge"), [("norms", 4), ("udfc", 16)])
def test_images_that_restored_do_not_judge(tiny_net, images, restore, judge):
    found = dfq.compress(tiny_net, images, channels="all", restore=restore)
    assert found.report.images == judge
    assert found.settings["held out"] == judge
    assert any("only judge the result" in note for note in found.report.notes) == (judge == 16)


def test_a_budget_of_work_is_kept(tiny_net, images):
    found = dfq.compress(tiny_net, images, budget="70% MACs", channels="all", restore="udfc")
    assert found.pruned is not None
    assert 0.5 < found.pruned.macs[1] / found.pruned.macs[0] <= 0.7
    assert found.settings["pruned"].startswith("to 70% MACs all channels by energy")


def test_zeros_stay_zeros_in_the_file(nets, tmp_path):
    """On symmetric grids of 8 bits and on those of 4, which have zero points."""
    net = nets.wide()
    given = dfq.Examples((nets.images(net, 16),), net.inputs)
    found = dfq.compress(net, given, sparsity="2:4", scheme="w4a8", untouched=("conv3",))
    assert found.pruned is None
    manifest = found.save(tmp_path / "out", verification=found.verify())
    assert manifest["status"] == "ok"
    stored = load_artifact(tmp_path / "out").quantized
    kernels = {Site(layer): found["kernel"] for layer, found in stored_codes(stored).items()}
    bits = {stored.plan.table[site].levels.bits for site in kernels}
    assert bits == {4, 8}
    for site, integers in kernels.items():
        zero = np.asarray(found.float_model.params[site.node]["kernel"]) == 0
        if site.node in ("conv2", "conv4", "conv5"):
            assert zero.mean() == 0.5
        found_at = stored.qparams[site]
        assert isinstance(found_at, Affine)
        origin = np.broadcast_to(np.asarray(found_at.zero_point), zero.shape)
        assert (integers == origin)[zero].all(), site
    told = manifest["report"]["sparsity"]
    assert told["pattern"] == "2:4"
    assert {x["name"]: x["before"] for x in told["layers"]}["conv3"] == 0
    assert told["after"] >= told["before"] > 0.25
    assert "sparse 2:4, not conv3" in str(found)
    assert f"{100 * told['before']:.1f} % of the weights made zero (2:4)" in str(found)
    assert "Weights at zero" in (tmp_path / "out" / "report.html").read_text()


def test_fewer_channels_and_zeros_together(tiny_net, images):
    found = dfq.compress(tiny_net, images, prune="30%", channels="all", sparsity="50%")
    assert found.pruned is not None
    assert found.zeros is not None
    assert found.float_model.params["conv1"]["kernel"].shape[-1] < 6
    counts = {x.name: x.before / x.weights for x in found.zeros.layers}
    assert np.isclose(counts["project"], 0.5)
    assert counts["depthwise"] == 0


def test_what_is_left_may_stay_in_float(tiny_net, images, nets):
    """The file computes the pruned network; the original judges it."""
    how = {"channels": "all", "prune": "30%", "untouched": ("conv2",), "scheme": "float"}
    small = dfq.compress(tiny_net, images, **how)
    assert small.settings["scheme"] == "float"
    assert small.quantized.plan.entries == ()
    seen = nets.images(tiny_net, 4, seed=3)
    session = onnxruntime.InferenceSession(serialize(quantized_onnx(small.quantized)))
    (name,) = (x.name for x in session.get_inputs())
    run: Any = session.run(None, {name: np.moveaxis(np.asarray(seen), -1, 1)})[0]
    assert np.allclose(run, np.asarray(dfq.predict(small.float_model, seen)), atol=1e-4)
    exact, less = (
        np.asarray(dfq.predict(m, small.probes.images)) for m in (tiny_net, small.float_model)
    )
    far = np.mean((less - exact) ** 2) / np.mean(exact**2)
    assert np.isclose(small.report.sqnr, -10 * np.log10(far), atol=0.1)


def test_the_command(dfq, made, tmp_path):
    line = (made / "net.safetensors", "--arch", "small", "--images", made / "images.npz")
    out = tmp_path / "out"
    found = dfq("compress", *line, "-o", out, "--prune", "40%", "--channels", "all", "--json")
    report = found.data["report"]
    assert report["pruning"]["macs"]["after"] < report["pruning"]["macs"]["before"]
    assert found.data["status"] == "ok"
    assert dfq("verify", out).code == 0
    assert 'prune = "40%"' in (out / "config.toml").read_text()
    again = ("compress", *line, "-o", tmp_path / "again", "--config", out / "config.toml")
    assert dfq(*again).code == 0
    for name in ("model.onnx", "float.onnx", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_command_makes_zeros(dfq, made, tmp_path):
    line = (made / "net.safetensors", "--arch", "small", "--images", made / "images.npz")
    found = dfq("compress", *line, "-o", tmp_path / "out", "--sparsity", "80%", "--json")
    assert found.code == 0
    assert found.data["report"]["sparsity"]["pattern"] == "80% zeros"
    assert found.data["report"]["sparsity"]["before"] > 0.7
    assert "pruning" not in found.data["report"]
    config = (tmp_path / "out" / "config.toml").read_text()
    assert 'sparsity = "80%"' in config


def test_the_command_leaves_what_is_left_in_float(dfq, made, tmp_path):
    line = (made / "net.safetensors", "--arch", "small", "--images", made / "images.npz")
    out, zeros = tmp_path / "out", ("--sparsity", "2:4", "--scheme", "float")
    found = dfq("compress", *line, "-o", out, "--prune", "40%", *zeros, "--json")
    assert found.code == 0
    assert found.data["scheme"] == "float"
    assert found.data["report"]["pruning"]["macs"]["after"] > 0
    assert found.data["report"]["sparsity"]["after"] == found.data["report"]["sparsity"]["before"]
    assert found.data["speedup"] is None
    assert dfq("verify", out).code == 0
    assert "nothing in this folder is in integers" in dfq("bench", out, "--runs", 1).out


def interrupted(*_):
    raise KeyboardInterrupt


def stopped_at(text):
    """A watcher that stops the run once something is told."""
    return Watcher(stage=lambda told: interrupted() if text in told else None)


LEARNING = ("--reconstruction", "qdrop", "--reconstruction-steps", "10", "--scheme", "w4a8")


@pytest.mark.parametrize(
    ("more", "watchers"),
    [
        (("--sparsity", "50%"), (stopped_at("smaller"),)),
        pytest.param(
            LEARNING, (stopped_at("smaller"), Watcher(unit=interrupted)), marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    more, watchers, dfq, made, monkeypatch, tmp_path
):
    """Killed while channels go, and while rounding is learned: both find what was there."""
    asked = ("compress", made / "net.safetensors", "--arch", "small", "--prune", "40%", *more)
    making = ("--channels", "all", "-n", "8", "--steps", "2", "--method", "zeroq")
    line, out = (*asked, *making), tmp_path / "out"
    for watcher in watchers:
        with monkeypatch.context() as patch:
            patch.setattr("dfq_jax.report.console.Terminal.watcher", watcher)
            assert dfq(*line, "-o", out).code == 130
        assert not out.exists()
        assert any((tmp_path / ".out.run").iterdir())
    other = dfq(*line, "-o", out, "--seed", "1")
    assert other.code == 2
    assert "seed: saved 0, now 1" in other.err
    codes = {dfq(*line, "-o", folder).code for folder in (out, tmp_path / "whole")}
    assert len(codes) == 1
    assert codes < {0, 4}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}
    for file in out.iterdir():
        if file.name not in ("manifest.json", "report.html"):  # seconds that it took
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes(), file.name


def test_a_folder_pruned_from_another_network_is_kept(dfq, made, checkpoints, tmp_path):
    line = ("--arch", "small", "--images", made / "images.npz", "--restore", "none")
    out = ("-o", tmp_path / "out", "--channels", "all")
    assert dfq("compress", made / "net.safetensors", *line, *out).code == 0
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    weights = checkpoints.tensors()
    weights["fc.bias"] = weights["fc.bias"] + 1
    other = checkpoints.write(tmp_path / "other.safetensors", weights)
    refused = dfq("compress", other, *line, *out)
    assert refused.code == 2
    assert "holds a network pruned from another one" in refused.err
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before
    assert dfq("compress", other, *line, *out, "--force").code == 0


def test_a_command_that_means_nothing(dfq, made, tmp_path):
    line = ("compress", made / "net.safetensors", "--arch", "small", "-o", tmp_path / "out")
    found = dfq(*line, "--prune", "30")
    assert found.code == 2
    assert "say 30%" in found.err
    assert not (tmp_path / "out").exists()
    missing = dfq(*line, "--untouched", "layer9*")
    assert missing.code == 2
    assert "matches no layer" in missing.err


def test_what_is_left_learns_from_the_whole(tiny_net, images, monkeypatch):
    heard = []
    watch = Watcher(stage=heard.append)
    small_lesson = lambda model, steps, task: retraining(steps=steps, batch=4, learning_rate=1e-4)
    monkeypatch.setattr("dfq_jax.api.compress.retraining_for", small_lesson)
    found = dfq.compress(
        tiny_net,
        images,
        channels="all",
        restore="norms",
        sparsity="2:4",
        prune="30%",
        train=8,
        watch=watch,
    )
    assert found.settings["trained"] == "8 steps of 4 images"
    assert any("what is left was trained 8 steps" in note for note in found.report.notes)
    assert found.zeros is not None
    assert found.zeros.shares[0] > 0.2
    assert "training what is left: 8 steps of 4 images" in heard
    assert found.pruned is not None
    assert found.pruned.model is found.float_model


def test_training_that_is_dropped_is_told_so(tiny_net, images, monkeypatch):
    ruin = lambda model, steps, task: retraining(steps=steps, batch=4, learning_rate=30.0)
    monkeypatch.setattr("dfq_jax.api.compress.retraining_for", ruin)
    found = dfq.compress(tiny_net, images, channels="all", restore="norms", train=4)
    assert found.settings["trained"] == "4 steps of 4 images, not kept"
    assert any("stays as it was before training" in note for note in found.report.notes)


def test_bits_and_channels_within_one_budget(dfq, made, tmp_path):
    """The folder keeps to the bytes, and tells of both."""
    line = (made / "net.safetensors", "--arch", "small", "--images", made / "images.npz")
    asked = ("--bits", "joint", "--channels", "all", "--restore", "udfc")
    out = tmp_path / "out"
    found = dfq("compress", *line, *asked, "--budget", "50% bytes", "-o", out, "--json")
    assert found.code == 0, found.err
    told = found.data["report"]["joint"]
    size = lambda point: parse_budget(point["cost"]).amount
    assert size(told["chosen"]) <= 0.5 * size(told["uniform"])
    groups = {x["name"]: x["channels"] for x in told["groups"]}
    left = dict(zip(groups, told["chosen"]["channels"], strict=True))
    assert any(left[name] < count for name, count in groups.items())
    shown = {x["name"]: x["outputs"]["after"] for x in found.data["report"]["pruning"]["layers"]}
    assert {name: shown[name] for name in left} == left
    bits = {x["name"]: x["weight_bits"] for x in found.data["report"]["layers"]}
    for name, chosen in zip(told["kernels"], told["chosen"]["bits"], strict=True):
        assert bits[name] == chosen
    assert (out / "front.png").stat().st_size > 0
    assert "Bits and channels within the budget" in (out / "report.html").read_text()
    assert found.data["report"]["settings"]["budget"].endswith("of 50% B (joint, kl)")
    assert dfq("verify", out).code == 0


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({}, "no budget of bytes says how many"),
        ({"budget": "4bits"}, "no budget of bytes says how many"),
        ({"budget": "50% MACs"}, "says nothing of bits"),
        ({"budget": "3ms"}, "says nothing of bits"),
        ({"budget": "1% bytes"}, r"1% B is out of reach.* takes \d"),
        ({"budget": "50% bytes", "split": 0.1}, "leave one of the two out"),
    ],
)
def test_bits_with_channels_that_mean_nothing(how, told, tiny_net, monkeypatch):
    monkeypatch.delattr(quantizing, "synthesize")
    with pytest.raises(UsageError, match=told):
        dfq.compress(tiny_net, bits="joint", **how)
