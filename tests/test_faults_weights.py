"""`dfq` on weights that no healthy training leaves behind, and results that are no success."""

import json
import shutil

import numpy as np
import pytest

from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.recipes.noise import NO_STATISTICS

# weights that no healthy training leaves behind


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_named(run, weights, tmp_path, bad):
    weights["conv2.weight"][3, 1, 0, 0] = bad
    weights["bn4.running_var"][0] = bad
    found = run("quantize", weights)
    assert (found.code, found.out) == (2, "")
    assert "NaN or infinite values in 2 tensors: conv2.weight (1 of 864), bn4" in found.err
    assert not (tmp_path / "out").exists()


def test_variances_that_are_none_are_excluded_and_counted(run, weights, tmp_path):
    weights["bn1.running_var"][:2] = 0
    weights["bn3.running_var"][:3] = -1
    found = run("inspect", weights)
    assert found.code == 0
    assert "4 of 4 batch norms usable for synthesis" in found.out
    assert "bn1: 2 of 8 channels excluded (variance not positive)" in found.out
    assert "bn3: 3 of 8 channels excluded (variance not positive)" in found.out
    assert "negative running variance raised to 0: bn3 (3 channels)" in found.err
    out = tmp_path / "i.npz"
    made = run("synthesize", weights, "-o", out, "-n", 2, "--steps", 2, "--method", "zeroq")
    assert made.code == 0
    assert load_images(out).provenance["excluded"] == [
        "bn1: 2 of 8 channels excluded (variance not positive)",
        "bn3: 3 of 8 channels excluded (variance not positive)",
    ]
    assert np.isfinite(np.asarray(load_images(out).images)).all()
    assert run("quantize", weights).code in (0, 4)
    assert load_artifact(tmp_path / "out").manifest["files"]


def test_networks_never_trained_get_noise_and_less_confidence(run, weights, tmp_path):
    for name in weights:
        if "running" in name:
            weights[name][...] = float(name.endswith("var"))
    found = run("inspect", weights)
    assert found.code == 0
    assert "0 of 4 batch norms usable for synthesis" in found.out
    assert NO_STATISTICS in found.out
    assert "bn1, bn2, bn3, bn4" in found.err
    made = run("synthesize", weights, "-o", tmp_path / "i.npz", "-n", 4)
    assert made.code == 0
    assert "4 images by noise" in made.out
    assert NO_STATISTICS in made.err
    assert load_images(tmp_path / "i.npz").provenance["method"] == "noise"
    (tmp_path / "i.npz").unlink()
    assert run("quantize", weights).code == 0


@pytest.mark.parametrize("case", ["dead channel", "large bias", "all dead"])
def test_extreme_weights_give_finite_scales_and_verify(run, weights, tmp_path, case):
    if case == "dead channel":
        weights["conv1.weight"][2] = 0
        weights["bn1.running_mean"][2] = weights["bn1.running_var"][2] = 0
    elif case == "large bias":
        weights["fc.weight"][1] *= 1e-9
        weights["fc.bias"][1] = 50
    else:
        weights["project.weight"][...] = 0
    found = run("quantize", weights)
    assert found.code == 0, found.err
    assert "\nverified against ONNX Runtime" in found.out
    for site, affine in load_artifact(tmp_path / "out").quantized.affines.items():
        scale = np.asarray(affine.scale)
        assert np.isfinite(scale).all(), site
        assert (scale > 0).all(), site


def test_numbers_beyond_float32_end_as_a_failed_model(run, weights, tmp_path):
    weights["bn2.weight"] *= 1e30
    weights["conv2.weight"] *= 1e30
    found = run("quantize", weights)
    assert found.code == 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["report"]["finite"] is False


def test_one_channel_and_thirty_two_pixels(dfq, checkpoints, tmp_path):
    net, images = tmp_path / "net.safetensors", tmp_path / "i.npz"
    checkpoints.write(net, checkpoints.tensors(size=32, channels=1, classes=3))
    model = (net, "--arch", "small", "--size", 32)
    short = ("-n", 4, "--steps", 2, "--method", "zeroq", "--preview", tmp_path / "grid.png")
    found = dfq("synthesize", *model, "-o", images, *short)
    assert found.code == 0
    assert "mean 0.5, std 0.5, for 1 channels" in found.err
    low = ("--scheme", "w4a8", "--layers", "brecq_8bit_ends_second")
    done = dfq("quantize", *model, "-o", tmp_path / "out", "--images", images, *low)
    assert done.code in (0, 4)
    rows = {line.split()[0]: line.split()[2] for line in done.out.splitlines()[1:6]}
    expected = ("8/8", "4/8", "4/8", "4/8", "8/8")
    assert rows == dict(
        zip(("conv1", "depthwise", "project", "conv2", "fc"), expected, strict=True)
    )
    manifest = load_artifact(tmp_path / "out").manifest
    assert (manifest["scheme"], manifest["layers"]) == ("w4a8", "brecq_8bit_ends_second")
    assert "input 32x32 1 channels, (pixel/255 - (0.5)) / (0.5) (assumed" in done.out
    assert "32 x 32, 1 channels" in (tmp_path / "out" / "report.html").read_text()
    other = dfq("quantize", net, "--arch", "small", "-o", tmp_path / "no", "--images", images)
    assert (other.code, other.out) == (2, "")
    assert "made for height 32, the network reads 8" in other.err


# results that are no success


def test_a_collapsed_network_is_kept_as_failed(run, made, monkeypatch, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    monkeypatch.setattr("dfq_jax.report.trust.COLLAPSED", -1.0)
    found, out = run("quantize", None), tmp_path / "out"
    assert found.code == 4
    assert found.out.splitlines()[-1] == f"FAILED, kept: {out / 'model.failed.onnx'}"
    assert "it is expected to lose" in found.err
    assert "more than half of its accuracy" in found.err
    assert " costs most: quantized alone, it leaves the output " in found.err
    assert f"`dfq doctor {out}` computes what more bits and other settings would buy." in found.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["status"], manifest["report"]["passed"]) == ("failed", False)
    told = manifest["report"]["layer_costs"]
    assert {x["name"] for x in told} >= {"conv1", "depthwise", "project", "conv2", "fc"}
    assert not (out / "model.onnx").exists()
    page = (out / "report.html").read_text()
    assert "FAILED: it is expected to lose" in page
    assert "<h2>What each layer costs</h2>" in page
    again = run("quantize", None, "--json")
    assert again.code == 4
    data = json.loads(again.out)
    assert (data["status"], data["model"]) == ("failed", str(out / "model.failed.onnx"))


# image synthesis that cannot go well


def test_divergence_at_every_rate_ends_with_4(run, weights, tmp_path):
    """Numbers beyond float32 at the first step already."""
    weights["bn2.weight"] *= 1e30
    weights["conv2.weight"] *= 1e30
    how = ("-n", 2, "--steps", 12, "--method", "zeroq")
    found = run("synthesize", weights, "-o", tmp_path / "i.npz", *how)
    assert (found.code, found.out) == (4, "")
    assert "error: zeroq: the loss became NaN or infinite at step 0 in each of 4" in found.err
    assert "Check the weights with `dfq inspect`, or use fewer --steps" in found.err
    assert not (tmp_path / "i.npz").exists()


def test_images_too_large_for_the_machine_end_with_5(run, tmp_path):
    found = run("synthesize", None, "-o", tmp_path / "i.npz", "--size", 100_000, "-n", 64)
    assert (found.code, found.out) == (5, "")
    assert "best: 64 images of 100000x100000 pixels at a time need at least 34.9 TiB" in found.err
    assert not (tmp_path / "i.npz").exists()
