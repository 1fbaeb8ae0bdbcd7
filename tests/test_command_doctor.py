"""`dfq doctor` on folders, failed ones too, and on models; what it says is true."""

import json
import shlex
import shutil

import pytest
from plain_text import plain

from dfq_jax.allocation import costs
from dfq_jax.api import quantize as quantizing
from dfq_jax.cli.app import main
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.recipes.presets import ImageBudget

KEYS = {
    *("target", "title", "images", "output_sqnr_db", "agreement", "bytes", "costs", "remedies"),
    *("recommended", "enough", "untried", "seconds"),
}


@pytest.fixture(scope="module")
def low(made, checkpoints, tmp_path_factory):
    """An output folder of few bits, made with a rule."""
    out = tmp_path_factory.mktemp("doctor") / "low"
    line = ("quantize", made / "net.safetensors", "--arch", "small", "-o", out)
    how = ("--images", made / "images.npz", "--scheme", "w2a2", "--rule", "project=w3")
    with checkpoints.registered(), pytest.raises(SystemExit) as caught:
        main([str(word) for word in (*line, *how)])
    assert caught.value.code in (0, 4)
    return out


@pytest.fixture
def few_images(monkeypatch):
    """Presets make 8 images in 2 steps."""
    budget = lambda *_, **__: ImageBudget("zeroq", 8, 2)
    monkeypatch.setattr(quantizing, "image_budget", budget)


def test_a_folder(dfq, low, monkeypatch):
    monkeypatch.setattr(costs, "UNPACKING", -1)  # these kernels are too small to be packed
    monkeypatch.chdir(low.parent)
    found = plain(dfq("doctor", low.name))
    assert found.code == 0
    lines = found.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("low: w2a2, preset fast, layers qdrop_8bit_ends")
    assert any(line.startswith("as it is ") for line in lines)
    assert any(line.startswith("everything at 8 bits ") for line in lines)
    assert "quantizing one layer at a time" in found.err
    assert "--preset balanced: makes" in found.out
    assert "--budget" in found.out


def test_what_it_says_of_a_folder_is_what_was_saved(dfq, low):
    data = dfq("doctor", low, "--json").data
    report = load_artifact(low).manifest["report"]
    assert set(data) == KEYS
    assert data["output_sqnr_db"] == pytest.approx(report["output_sqnr_db"], abs=0.05)
    assert data["agreement"] == report["agreement"]
    assert report["settings"]["rules"] == "project=w3"
    so_far = {x["name"]: x["so_far_db"] for x in data["costs"] if x["so_far_db"] is not None}
    assert so_far == {x["name"]: x["sqnr"] for x in report["layers"]}
    assert data["bytes"] == load_artifact(low).onnx_path.stat().st_size


def test_the_command_of_a_remedy_does_what_was_foretold(dfq, low, made, tmp_path):
    """Bytes to the byte; SQNR near, since ranges and biases are found anew."""
    data = dfq("doctor", low, "--json").data
    remedy = next(x for x in data["remedies"] if x["remedy"] == "all weights at 8 bits")
    words = shlex.split(remedy["command"])
    assert words[:3] == ["dfq", "quantize", "net.safetensors"]
    assert words[-4:] == ["--rule", "project=w3", "--rule", "*=w8"]
    words[2], words[words.index("-o") + 1] = made / "net.safetensors", tmp_path / "better"
    assert dfq(*words[1:], "--images", made / "images.npz").code in (0, 4)
    after = load_artifact(tmp_path / "better")
    assert after.onnx_path.stat().st_size == pytest.approx(remedy["bytes"], abs=32)
    sqnr = after.manifest["report"]["output_sqnr_db"]
    assert sqnr == pytest.approx(remedy["output_sqnr_db"], abs=1.0)


def test_a_failed_folder(dfq, made, tmp_path, monkeypatch):
    monkeypatch.setattr("dfq_jax.report.trust.COLLAPSED", -1.0)
    monkeypatch.chdir(tmp_path)
    line = ("quantize", made / "net.safetensors", "--arch", "small", "-o", "out")
    assert dfq(*line, "--images", made / "images.npz").code == 4
    found = plain(dfq("doctor", "out", "--top", 2, "--chart", "bars.png"))
    assert found.code == 0
    title = "out: w8a8, preset fast, layers qdrop_8bit_ends, FAILED"
    assert found.out.splitlines()[0] == title
    assert "the worst layer in float" in found.out  # all have 8 bits already
    assert "more cost less (--top" in found.out
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_the_python_api_has_no_options(dfq, low, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(low, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["config.toml"]
    (folder / "config.toml").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = dfq("doctor", folder, "--json").data["remedies"][0]["command"]
    assert "--scheme w2a2 --preset fast --layers qdrop_8bit_ends" in command
    assert "--config" not in command


@pytest.mark.usefixtures("few_images")
def test_a_model(dfq, made):
    net = made / "net.safetensors"
    found = dfq("doctor", net, "--arch", "small", "--scheme", "w3a3", "--rule", "fc=a4", "--json")
    assert found.code == 0
    assert set(found.data) == KEYS
    assert found.data["title"] == "small w3a3, preset fast, layers qdrop_8bit_ends"
    first = found.data["remedies"][0]
    assert first["command"].startswith(
        f"dfq quantize {net} --arch small --scheme w3a3 --layers qdrop_8bit_ends -o out "
        "--rule fc=a4 --rule "
    )
    assert found.data["bytes"] > 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["nowhere.pth"], "there is no file 'nowhere.pth'"),
        ([".", "--top", "0"], "--top 0: show at least one layer."),
        ([".", "--chart", "nowhere/x.png"], "--chart nowhere/x.png: its folder does not exist."),
        (["net", "--arch", "small", "--scheme", "w1a1"], "scheme 'w1a1' is not"),
        (["net", "--arch", "small", "--rule", "fc"], "rule 'fc' is none"),
    ],
)
def test_what_makes_no_sense_ends_with_2(dfq, made, tmp_path, monkeypatch, more, told):
    monkeypatch.chdir(tmp_path)
    words = [made / "net.safetensors" if word == "net" else word for word in more]
    found = plain(dfq("doctor", *words))
    assert (found.code, found.out) == (2, "")
    assert told in found.err


def test_folders_that_hold_no_artifact_end_with_2(dfq, low, tmp_path):
    found = dfq("doctor", tmp_path)
    assert found.code == 2
    assert "holds no artifact" in found.err
    folder = tmp_path / "damaged"
    shutil.copytree(low, folder)
    with (folder / "float.onnx").open("ab") as file:
        file.write(b"x")
    found = dfq("doctor", folder)
    assert found.code == 2
    assert "float.onnx is not what was saved" in found.err
