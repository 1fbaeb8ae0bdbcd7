import dataclasses
import json
import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import onnx
import PIL.Image
import pytest

from dfq_jax.data.preprocess import preprocess
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Conv2d, GlobalAvgPool
from dfq_jax.io.artifacts.artifact import load_artifact, save_artifact
from dfq_jax.io.artifacts.deployment import run_py
from dfq_jax.io.artifacts.output_folder import RUN
from dfq_jax.io.onnx.export import described
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.io.verification.file import differences, same_fact
from dfq_jax.types import NCHW, NHWC, InputContract

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTRACTS = {
    "resized and cropped": InputContract(20, 16, MEAN, STD, resize=24),
    "bicubic": InputContract(16, 16, MEAN, STD, resize=17, interpolation="bicubic"),
    "stretched": InputContract(20, 12, MEAN, STD),
    "grey": InputContract(16, 16, (0.5,), (0.25,), resize=16),
    "channels last": InputContract(16, 20, MEAN, STD, resize=24, layout=NHWC),
}
SIZES = ((41, 30), (30, 41), (16, 16), (24, 24))


def picture(folder, size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    path = folder / "picture.png"
    PIL.Image.fromarray(pixels).resize(size).convert(mode).save(path)
    return path


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_the_library_does(name, size, tmp_path):
    (tmp_path / RUN).write_bytes(run_py("model.onnx"))
    contract = CONTRACTS[name]
    prepared = runpy.run_path(str(tmp_path / RUN))["prepared"]
    path = picture(tmp_path, size)
    found = prepared(path, json.loads(json.dumps(described(contract))))
    with PIL.Image.open(path) as image:
        want = preprocess(image, contract)[None]
    want = want if contract.layout == NHWC else want.transpose(0, 3, 1, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_the_script_of_a_folder_prints_the_top_classes(layout, onnx_nets, tmp_path):
    q = onnx_nets.quantized("residual")
    contract = dataclasses.replace(q.model.contract, layout=layout, resize=20)
    of = lambda model: dataclasses.replace(model, inputs=(contract,))
    q = dataclasses.replace(q, model=of(q.model))
    model = of(onnx_nets.NETS["residual"]())
    save_artifact(tmp_path / "out", q, float_model=model)
    path = picture(tmp_path, (40, 30))
    told = subprocess.run(
        [sys.executable, tmp_path / "out" / RUN, path], capture_output=True, text=True, check=True
    )
    with PIL.Image.open(path) as image:
        x = preprocess(image, contract)[None]
    session = open_session(tmp_path / "out" / "model.onnx", optimize=True, precise=True)
    scores = run(session, x, layout)[0]
    best = np.argsort(scores)[::-1][:5]
    assert told.stdout.splitlines() == [f"logits {k}: {scores[k]:.4f}" for k in best]
    assert "run.py" in load_artifact(tmp_path / "out").manifest["files"]


def test_networks_that_read_no_pictures_have_no_script(onnx_nets, tmp_path):
    q = onnx_nets.quantized("residual")
    four = dataclasses.replace(q.model.contract, mean=(0.5,) * 4, std=(0.5,) * 4)
    params = {"conv": {"kernel": jnp.ones((1, 1, 4, 2))}}
    nodes = (Node("conv", Conv2d(), ("x",)), Node("pool", GlobalAvgPool(), ("conv",)))
    model = Model(Graph(nodes, ("x",), ("pool",)), params, (four,))
    save_artifact(tmp_path / "out", q, float_model=model)
    assert not (tmp_path / "out" / RUN).exists()


def test_files_of_before_the_crop_was_said_still_verify(onnx_nets):
    q = onnx_nets.quantized("residual")
    proto = onnx.load_model_from_string(onnx_nets.integer_file("residual"))
    said = next(p for p in proto.metadata_props if p.key == "dfq.contract")
    older = {k: v for k, v in json.loads(said.value).items() if k != "crop"}
    said.value = json.dumps(older)
    assert list(differences(proto, q)) == []
    for wrong in ({**older, "crop": "left"}, {**older, "height": 17}, older | {"mean": None}, 3):
        said.value = json.dumps(wrong)
        assert list(differences(proto, q)) == ["its dfq.contract is not that of the network"]
    assert not same_fact(None, "w8a8")
    assert same_fact("w8a8", "w8a8")
