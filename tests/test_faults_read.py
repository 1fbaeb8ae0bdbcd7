"""`dfq verify`, `evaluate`, `bench` and `doctor` on folders and files that fit nothing inside."""

import json
import shutil

import numpy as np
import onnx
import PIL.Image
import pytest
import safetensors.numpy

from dfq_jax.base.files import sha256_of


@pytest.fixture
def out(made, tmp_path):
    """A copy of an output folder."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def pictures(tmp_path):
    """A folder of class folders for the ten classes of `small`."""
    for label in range(3):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for index in range(2):
            PIL.Image.new("RGB", (9, 9), (40 * label, 9, 90 * index)).save(
                tmp_path / "data" / str(label) / f"{index}.png"
            )
    return tmp_path / "data"


def edited(out, change):
    """Changes a manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def rewritten(out, name, content):
    """Replaces a file together with its hash."""
    (out / name).write_bytes(content)
    facts = {"bytes": len(content), "sha256": sha256_of(out / name)}
    edited(out, lambda m: m["files"].update({name: facts}))


def with_tensors(out, change):
    """Changes the numbers of a network."""
    tensors = safetensors.numpy.load((out / "model.safetensors").read_bytes())
    change(tensors)
    rewritten(out, "model.safetensors", safetensors.numpy.save(tensors))


def cut(name, *index):
    def change(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][index])

    return change


def typed(name, kind):
    return lambda tensors: tensors.update({name: tensors[name].astype(kind)})


TENSORS = {
    "a kernel of fewer channels": cut("conv1.kernel", ..., slice(1, None)),
    "a kernel without axes": lambda t: t.update({"conv1.kernel": np.array(3, np.int8)}),
    "a kernel in float": typed("conv1.kernel", np.float32),
    "a kernel of another type": typed("conv1.kernel", np.int16),
    "a bias of another length": cut("conv1.bias", slice(1, None)),
    "a bias in float64": typed("conv1.bias", np.float64),
    "scales of another length": cut("conv1.kernel_scale", ..., slice(1, None)),
    "a scale too many": lambda t: t.update({"conv1.input0_scale": np.ones(2, np.float32)}),
    "a zero point too many": lambda t: t.update({"conv1.input0_zero_point": np.ones(2, np.uint8)}),
    "a scale in float16": typed("conv1.kernel_scale", np.float16),
    "a scale that is NaN": lambda t: t["conv1.kernel_scale"].fill(np.nan),
    "a tensor of nobody": lambda t: t.update({"nobody.kernel": np.ones(2, np.float32)}),
    "no kernel": lambda t: t.pop("conv1.kernel"),
    "no scale": lambda t: t.pop("conv1.kernel_scale"),
    "no numbers": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_numbers_of_other_types_and_shapes(dfq, out, change):
    with_tensors(out, change)
    for verb in ("verify", "bench", "doctor"):
        found = dfq(verb, out)
        assert (found.code, found.out) == (2, ""), verb


DEEP = json.loads("[" * 400 + "]" * 400)
MANIFESTS = {
    "no report": lambda m: m.pop("report"),
    "no scheme": lambda m: m.pop("scheme"),
    "no nodes": lambda m: m["graph"].pop("nodes"),
    "nodes that are numbers": lambda m: m["graph"].update(nodes=[1, 2]),
    "an unknown operator": lambda m: m["graph"]["nodes"][0].update(op="Hack"),
    "an input that is none": lambda m: m["graph"]["nodes"][0].update(inputs=["nothing"]),
    "a field that is none": lambda m: m["graph"]["nodes"][0]["fields"].update(hack=1),
    "strides of text": lambda m: m["graph"]["nodes"][0]["fields"].update(strides="ab"),
    "deep fields": lambda m: m["graph"]["nodes"][0]["fields"].update(strides=DEEP),
    "a site that is none": lambda m: m["plan"]["sites"][0].update(node="nobody"),
    "a slot that is none": lambda m: m["plan"]["sites"][0].update(slot="inputs"),
    "an argument that is none": lambda m: m["plan"]["groups"][0].update(
        sites=[["conv1", "input7"]]
    ),
    "groups that are none": lambda m: m["plan"].update(groups=[3]),
    "a grid of 99 bits": lambda m: m["plan"]["sites"][0]["grid"].update(bits=99),
    "no contract": lambda m: m["contract"].clear(),
    "a contract of text": lambda m: m["contract"].update(height="tall"),
    "files that are numbers": lambda m: m["files"].update({"model.onnx": 7}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_with_something_missing_or_strange(dfq, out, change):
    edited(out, change)
    for verb in ("verify", "bench", "doctor"):
        found = dfq(verb, out)
        assert (found.code, found.out) == (2, ""), (verb, found.err)


def test_manifests_nested_too_deeply(dfq, out):
    (out / "manifest.json").write_text('{"graph": ' + "[" * 100_000)
    found = dfq("verify", out)
    assert (found.code, found.out) == (2, "")
    assert f"{out / 'manifest.json'} is damaged" in found.err


@pytest.mark.parametrize(
    "report", [{}, {"layers": 3}, {"layers": [{"name": "conv1"}], "settings": 1}]
)
def test_a_report_that_says_nothing_stops_no_doctor(dfq, out, report):
    edited(out, lambda m: m.update(report=report))
    found = dfq("doctor", out, "--json")
    assert found.data["costs"]


def fixed(out, batch, name="model.onnx"):
    """The file for so many images at a time."""
    model = onnx.load(out / name)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    rewritten(out, name, model.SerializeToString())


@pytest.mark.onnx
@pytest.mark.parametrize("batch", [1, 4])
def test_files_of_a_fixed_batch_are_evaluated_and_timed(dfq, out, pictures, batch):
    free = dfq("evaluate", out / "model.onnx", "--data", pictures, "--json").data
    for name in ("model.onnx", "float.onnx"):
        fixed(out, batch, name)
    assert dfq("evaluate", out / "model.onnx", "--data", pictures, "--json").data == free
    assert dfq("bench", out, "--runs", 2, "--json").code == 0


@pytest.mark.onnx
def test_files_that_cannot_run_say_so(dfq, out, pictures):
    model = onnx.load(out / "float.onnx")
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value, dims[3].dim_value = 99, 99
    (out / "other.onnx").write_bytes(model.SerializeToString())
    found = dfq("evaluate", out / "other.onnx", "--data", pictures)
    assert (found.code, found.out) == (2, "")
    assert "ONNX Runtime" in found.err
    extra = onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1])
    model.graph.input.append(extra)
    (out / "other.onnx").write_bytes(model.SerializeToString())
    found = dfq("evaluate", out / "other.onnx", "--data", pictures)
    assert found.code == 3
    assert "reads 'images' tensor(float)" in found.err or "is needed" in found.err


@pytest.mark.onnx
def test_failed_artifacts_are_read_back(dfq, out, pictures):
    (out / "model.onnx").rename(out / "model.failed.onnx")

    def failed(manifest):
        manifest["status"] = "failed"
        manifest["files"]["model.failed.onnx"] = manifest["files"].pop("model.onnx")

    edited(out, failed)
    assert dfq("verify", out).code == 0
    assert dfq("evaluate", out, "--data", pictures, "--json").data["n"] == 6
    assert "FAILED" in dfq("doctor", out).out
