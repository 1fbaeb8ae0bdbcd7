"""`dfq train` and `dfq_jax.train`: the same folder as from `dfq quantize`, resumed and refused."""

import json
import re
import typing

import optax
import pytest

import dfq_jax
from dfq_jax.base.words import TrainingName
from dfq_jax.cli.app import main
from dfq_jax.errors import UsageError
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.io.load import load
from dfq_jax.optim.progress import Watcher
from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, gdfq
from dfq_jax.recipes.trainings import TRAININGS, training_for
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import TrainingReport
from dfq_jax.training.level_rules import as_calibrated
from dfq_jax.training.losses import distillation, score_gap
from dfq_jax.training.method import FixedImages, Training, to_zero
from dfq_jax.training.student import StudentKind

STEPS = 20
LESSON = Training(
    *("lesson", STEPS, 4, StudentKind(live=True), FixedImages()),
    *((Term("KL", 1.0, distillation(), True),), to_zero(optax.adam, 1e-3, STEPS)),
)


@pytest.fixture
def net(made):
    """The arguments that name the network."""
    return made / "net.safetensors", "--arch", "small"


@pytest.fixture(scope="module")
def low(checkpoints, made, tmp_path_factory):
    """A folder of few bits, of which training makes more."""
    out = tmp_path_factory.mktemp("low") / "out"
    images = ("--images", made / "images.npz", "--scheme", "w2a4", "--layers", "zsq_all_low")
    line = ("quantize", made / "net.safetensors", "--arch", "small", "-o", out, *images)
    with checkpoints.registered(), pytest.raises(SystemExit) as caught:
        main([str(word) for word in line])
    assert caught.value.code == 0
    return out


@pytest.fixture
def network(checkpoints, made):
    with checkpoints.registered():
        return load(made / "net.safetensors", arch="small").model


@pytest.fixture
def short(made, low):
    """Options of a short training from the folder of few bits."""
    start = ("--start", low, "--images", made / "images.npz")
    return (*start, "--steps", STEPS, "--batch", 4)


def test_a_run_that_was_killed_ends_in_the_folder_of_one_that_was_not(
    dfq, net, low, short, monkeypatch, tmp_path
):
    out, stopped = tmp_path / "out", []

    def stop(progress):
        if progress.what == "training":
            stopped.append(progress.step)
            raise KeyboardInterrupt

    monkeypatch.setattr("dfq_jax.training.engine.CHUNK", 10)
    monkeypatch.setattr("dfq_jax.training.engine.distance", lambda *given, **named: 0.0)  # all kept
    with monkeypatch.context() as patch:
        patch.setattr("dfq_jax.report.console.Terminal.watcher", Watcher(progress=stop))
        assert dfq("train", *net, "-o", out, *short).code == 130
    assert stopped == [10]
    assert (tmp_path / ".out.run" / "training").is_dir()
    found = dfq("train", *net, "-o", out, *short)
    assert found.code == 0, found.err
    assert {p.name for p in out.iterdir()} == {p.name for p in low.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert "verified against ONNX Runtime" in found.out
    assert f"training (best): {STEPS} steps of 4 images" in found.err
    assert load_artifact(out).quantized.plan == load_artifact(low).quantized.plan
    report = json.loads((out / "manifest.json").read_text())["report"]
    assert report["settings"]["training"] == "best"
    assert any("held-out images outputs went from" in note for note in report["notes"])
    whole = dfq("train", *net, "-o", tmp_path / "whole", "--config", out / "config.toml")
    assert whole.code == 0, whole.err
    weights = lambda folder: (folder / "model.safetensors").read_bytes()
    assert weights(tmp_path / "whole") == weights(out) != weights(low)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--scheme", "w4a4"), r"has scheme w8a8, and --scheme w4a4"),
        (("--layers", "zsq_all_low"), r"has layers qdrop_8bit_ends, and --layers zsq_all_low"),
        (("--rule", "fc=8"), r"has its bits already"),
        (("--batch", "64"), r"takes 64 images a step and there are 6"),
        (("--steps", "0"), r"steps must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(dfq, net, made, tmp_path, more, told):
    start = ("--start", made / "out", "--images", made / "images.npz")
    found = dfq("train", *net, "-o", tmp_path / "out", *start, *more)
    assert found.code == 2
    assert re.search(told, " ".join(found.err.split()))
    assert not (tmp_path / "out").exists()


def test_a_start_of_other_weights_is_refused(dfq, checkpoints, made, tmp_path):
    other = checkpoints.write(tmp_path / "other.safetensors", checkpoints.tensors(seed=1))
    start = ("--start", made / "out", "--images", made / "images.npz")
    found = dfq("train", other, "--arch", "small", "-o", tmp_path / "out", *start)
    assert found.code == 2
    assert "was made from another network" in " ".join(found.err.split())


@pytest.mark.slow
def test_a_method_of_ones_own_from_the_float_network(network, made):
    """Batch norms are live, so the student begins unfolded and ends folded."""
    result = dfq_jax.train(
        network, load_images(made / "images.npz"), LESSON, scheme="w4a4", layers="zsq_all_low"
    )
    assert result.settings["training"] == "lesson"
    assert result.settings["scheme"] == "w4a4"
    assert result.quantized.plan.layers == "zsq_all_low"
    assert result.report.passed
    assert len(result.probes) == 2


def test_a_start_keeps_its_scales_and_that_is_told(network, made, low, monkeypatch):
    """Papers find extremes and ranges anew, which would undo what a start has learned."""
    told, asked = [], []

    def untrained(quantized, teacher, method, setup, **other):
        asked.append(method)
        return quantized, TrainingReport(method.name, 1, 0.0, 0.0, True, 0.0, 0.0)

    monkeypatch.setattr("dfq_jax.api.training_job.trained", untrained)
    method = gdfq(steps=1, batch=4, kind=GDFQ_GENERATOR._replace(channels=(4,)))
    watch = Watcher(stage=told.append)
    result = dfq_jax.train(
        network, load_images(made / "images.npz"), method, start=low, watch=watch
    )
    line = "gdfq from a start: norms stay folded, kernels keep its scales, ranges stay"
    assert line in told
    assert line in result.report.notes
    assert asked[0].student == StudentKind(as_calibrated())


def test_what_cannot_be_trained_is_refused_before_images_are_made(nets, monkeypatch):
    monkeypatch.delattr("dfq_jax.api.training_job.made_images")
    with pytest.raises(UsageError, match="needs a classifier for KL"):
        dfq_jax.train(nets.unet(), method="hast")


def test_methods_have_names_and_values():
    assert typing.get_args(TrainingName) == tuple(TRAININGS)
    for name, offer in TRAININGS.items():
        if offer.shown is None:  # else it takes real images too
            made = training_for(name, 40, 3)
            assert made == offer.make(steps=40, batch=3)
            assert made.name == name
        assert offer.make is getattr(dfq_jax.methods, {"best": "best_training"}.get(name, name))
    with pytest.raises(UsageError, match="nearest: gdfq"):
        training_for("gdfg")
    with pytest.raises(UsageError, match="has its own"):
        training_for(LESSON, steps=3)


def test_ours_needs_no_classes():
    assert TRAININGS["best"].make(classes=False).classes == ()
    assert score_gap in [term.fn for term in TRAININGS["best"].make(classes=False).terms]
