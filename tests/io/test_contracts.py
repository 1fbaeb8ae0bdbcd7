"""What files say of their images: read, contradicted, refused; and files of integers."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
from image_nets import FIRST, LAST, ImageNet, classifier

import dfq_jax as dfq
from dfq_jax.errors import DataError, UnsupportedModelError, UsageError
from dfq_jax.io.load import load
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.dfq import dfq as quantized_by
from dfq_jax.types import InputContract

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
CONTRACT = InputContract(12, 10, MEAN, STD, resize=14, interpolation="bicubic")


def saying(**changes):
    """The metadata of a file of ours, some of it changed."""
    said = {k: v for k, v in dataclasses.asdict(CONTRACT).items() if k != "names"}
    return {"dfq.contract": json.dumps(said | changes)}


def saved(tmp_path, proto):
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def float_file(tmp_path):
    """Exported as `dfq quantize` writes its float.onnx."""
    source = tmp_path / "source.onnx"
    onnx.save(classifier(), source)
    model = dfq.load(source)
    path = tmp_path / "float.onnx"
    dfq.export(dataclasses.replace(model, inputs=(CONTRACT,)), path)
    return path


def test_our_own_float_file_says_how_images_are_normalised(float_file):
    loaded = load(float_file)
    assert loaded.model.contract == CONTRACT
    assert any("float.onnx says how images are normalised: mean 0.5" in n for n in loaded.notes)
    assert not any("assumed" in note for note in loaded.notes)


def test_the_user_wins_over_the_file_and_is_told(float_file):
    loaded = load(float_file, mean=(0.1,), std=(0.9,))
    assert loaded.model.contract.mean == (0.1,) * 3
    assert loaded.model.contract.resize == 14
    told = "the network says mean 0.5,0.4,0.3, std 0.25,0.2,0.1; what you give is used: mean 0.1"
    assert any(told in note for note in loaded.notes)
    same = load(float_file, mean=MEAN, std=STD)
    assert not any("what you give is used" in note for note in same.notes)


def test_what_the_file_assumed_stays_assumed(tmp_path):
    loaded = load(saved(tmp_path, classifier(facts=saying(assumed=True))))
    assert loaded.model.contract.assumed
    assert any("nothing says how images are normalised" in note for note in loaded.notes)


def test_free_sizes_are_those_of_the_contract(tmp_path):
    path = saved(tmp_path, classifier(("n", 3, "h", "w"), saying(height=20, width=36, resize=22)))
    assert dfq.load(path).contract.shape == (20, 36, 3)
    other = dfq.load(path, size=(24, 24)).contract
    assert (other.shape, other.resize, other.mean) == ((24, 24, 3), 26, MEAN)


def test_the_layout_is_that_of_the_contract(tmp_path):
    net = ImageNet((1, 3, 10, 3))
    flat = net.add("Flatten", "x")
    kernel = net.weight(np.ones((90, 4), np.float32))
    proto = net.proto(net.add("Gemm", flat, kernel), facts=saying(height=3, layout="NHWC"))
    path = saved(tmp_path, proto)
    assert dfq.load(path).contract.layout == "NHWC"
    told = load(path, layout="nchw")
    assert told.model.contract.layout == "NCHW"
    assert any("read as NCHW; its file says NHWC" in note for note in told.notes)


def test_a_contract_of_other_channels_is_not_read(tmp_path):
    loaded = load(saved(tmp_path, classifier(facts=saying(mean=[0.5], std=[0.5]))))
    assert loaded.model.contract.assumed
    assert any("for 1 channels, which is not read" in note for note in loaded.notes)


UNUSABLE = {
    "nan": ({"mean": [float("nan")] * 3}, "not all finite"),
    "inf": ({"std": [1.0, float("inf"), 1.0]}, "not all finite"),
    "huge": ({"mean": [1e30] * 3}, r"not those of pixels in \[0, 1\]"),
    "large": ({"mean": [10**400] * 3}, "cannot read"),
    "zero": ({"std": [0.0] * 3}, "positive std"),
    "negative": ({"std": [-0.5] * 3}, "positive std"),
    "text": ({"mean": ["a", "b", "c"]}, "cannot read"),
    "bytes": ({"mean": [127.5] * 3, "std": [127.5] * 3}, "mean 0.5,0.5,0.5 and std 0.5,0.5,0.5"),
    "half a pixel": ({"height": 12.5}, "positive size|cannot read"),
    "resize": ({"resize": 0}, "positive size"),
    "layout": ({"layout": "HWCN"}, "layout is NCHW or NHWC"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_contracts_are_refused_unless_replaced(tmp_path, case):
    changes, message = UNUSABLE[case]
    path = saved(tmp_path, classifier(facts=saying(**changes)))
    with pytest.raises(
        DataError, match=f"(?s)unusable `dfq.contract`.*{message}.*`mean=` and `std=`"
    ):
        load(path)
    loaded = load(path, mean=MEAN, std=STD)
    assert loaded.model.contract.mean == MEAN
    assert any("carries an unusable dfq.contract, which is not read" in n for n in loaded.notes)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            "divided by 255: mean 0.485,0.456,0.406 and std 0.229,0.224,0.225",
        ),
        ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0), "std 0.00392157,0.00392157,0.00392157"),
        ((127.5,), (0.5,), "mean 0.5,0.5,0.5 and std 0.5,0.5,0.5"),
        ((0.5,), (2.0,), "not those of pixels"),
        ((-0.5,), (0.5,), "not those of pixels"),
        ((float("nan"),), (0.5,), "not all finite"),
        ((0.5,), (float("inf"),), "not all finite"),
        ((1e30,), (0.5,), r"not those of pixels in \[0, 1\]: images are"),
        ((0.5,), (1e-30,), "leaves no usable numbers"),
        ((0.5,), (-1.0,), "positive std"),
    ],
)
def test_numbers_that_normalise_no_image_are_refused(float_file, mean, std, message):
    with pytest.raises(UsageError, match=message):
        load(float_file, mean=mean, std=std)


def test_pixels_of_0_to_255_are_a_deviation_of_one_255th(float_file):
    contract = load(float_file, mean=(0.0,), std=(1 / 255,)).model.contract
    assert contract.value_range == (0.0, 255.0)


@pytest.mark.parametrize("shape", [FIRST, LAST])
def test_integer_files_are_refused_with_what_they_are(tmp_path, shape):
    model = dfq.load(saved(tmp_path, classifier(shape)))
    path = tmp_path / "model.onnx"
    dfq.export(quantized_by(model, None, parse_scheme("w8a8")).quantized, path)
    with pytest.raises(UnsupportedModelError, match="integer network already") as told:
        load(path)
    assert "batch norms were folded" not in str(told.value)
    assert "w8a8" in str(told.value)
    assert "float.onnx" in str(told.value)
    foreign = onnx.load(path)
    del foreign.metadata_props[:]
    with pytest.raises(UnsupportedModelError, match=r"quantized already: \d+ of its \d+ nodes"):
        load(saved(tmp_path, foreign), no_bn_fallback=True)
