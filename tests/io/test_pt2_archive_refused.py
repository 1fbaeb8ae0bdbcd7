"""Archives of weights in `.pt2` files that are damaged, lie, or are made to do harm."""

import contextlib
import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pt2_files import MODEL, WEIGHTS, Change, arrays, changed, edited, members, packed, small

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch


class Canary:
    """Creates a file when unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"archive_format": None}, CheckpointError, "no archive of torch.export"),
        ({"archive_format": b"pt3"}, CheckpointError, "archive format pt3"),
        ({"archive_version": b"1"}, UnsupportedModelError, "archive version 1"),
        ({"byteorder": b"middle"}, CheckpointError, "byte order middle"),
        ({MODEL: None}, CheckpointError, "no model under models/"),
        ({WEIGHTS: None}, CheckpointError, "no member .*weights_config"),
        ({"data/constants/model_constants_config.json": None}, CheckpointError, "no member"),
        ({"data/weights/weight_0": None}, CheckpointError, "no member .*weight_0"),
        ({"data/weights/weight_0": b""}, CheckpointError, "meta device"),
        ({"data/weights/weight_0": b"abc"}, CheckpointError, "reaches element 107 of a storage"),
        ({MODEL: b"[]"}, CheckpointError, "no JSON object"),
        ({MODEL: b"{"}, CheckpointError, "no valid JSON"),
        ({MODEL: b"\xff"}, CheckpointError, "no valid JSON"),
        ({MODEL: b'{"a": 1, "a": 2}'}, CheckpointError, "a repeated key"),
        ({MODEL: b"[" * 200_000}, UnsafeInputError, "nested too deeply"),
        ({MODEL: b'{"a":' * 200_000}, UnsafeInputError, "nested too deeply"),
        ({MODEL: b'{"a": ' + b"9" * 5000 + b"}"}, CheckpointError, "no valid JSON"),
        ({MODEL: b"{}" + b" " * (64 << 20)}, UnsafeInputError, "bytes of JSON"),
        ({WEIGHTS: b"{}"}, CheckpointError, "'config' is missing"),
        ({WEIGHTS: b'{"config": []}'}, CheckpointError, "'config' is .*, not an object"),
    ],
)
def test_members_that_are_damaged(changes, error, text):
    with pytest.raises(error, match=text):
        read_pt2(changed(small(), changes), "net.pt2")


def tensor_meta(**fields: Any) -> Change:
    """Changes what the file says about the tensor `0.weight`."""

    def change(record: Any) -> None:
        record["config"]["0.weight"]["tensor_meta"].update(fields)

    return change


def payload(**fields: Any) -> Change:
    """Changes where the file says the tensor `0.weight` is."""

    def change(record: Any) -> None:
        record["config"]["0.weight"].update(fields)

    return change


def ints(*values: Any) -> list[Any]:
    return [{"as_int": value} for value in values]


HUGE = 2**60


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (tensor_meta(sizes=ints(HUGE, 3, 3, 3)), CheckpointError, "claims shape"),
        (tensor_meta(sizes=ints(2**40, 1, 1, 1)), UnsafeInputError, "exceed the file many"),
        (
            tensor_meta(sizes=ints(2**40, 1, 1, 1), strides=ints(0, 0, 0, 0)),
            UnsafeInputError,
            "exceed the file many",
        ),
        (tensor_meta(sizes=ints(0, HUGE, 3, 3)), CheckpointError, "claims shape"),
        (tensor_meta(sizes=ints(5, 3, 3, 3)), CheckpointError, "reaches element 134"),
        (tensor_meta(sizes=ints(-4, 3, 3, 3)), CheckpointError, "a size, stride or offset is -4"),
        (tensor_meta(strides=ints(-27, 9, 3, 1)), CheckpointError, "offset is -27"),
        (tensor_meta(strides=ints(HUGE, 9, 3, 1)), CheckpointError, "reaches element"),
        (tensor_meta(strides=ints(27, 9, 3)), CheckpointError, "4 sizes and 3 strides"),
        (tensor_meta(sizes=ints(*[1] * 65), strides=ints(*[1] * 65)), CheckpointError, "65 sizes"),
        (tensor_meta(storage_offset={"as_int": 1}), CheckpointError, "reaches element 108"),
        (tensor_meta(storage_offset={"as_int": HUGE}), CheckpointError, "reaches element"),
        (tensor_meta(storage_offset={"as_int": True}), CheckpointError, "not an integer"),
        (tensor_meta(storage_offset=3), CheckpointError, "not an object"),
        (tensor_meta(sizes=[{"as_expr": {}}] * 4), CheckpointError, "size"),
        (tensor_meta(sizes=[{}] * 4), CheckpointError, "0 tags"),
        (tensor_meta(sizes=None), CheckpointError, "not a list"),
        (tensor_meta(dtype=8), CheckpointError, "reaches element 107 of a storage of 54"),
        (tensor_meta(dtype=10), UnsupportedModelError, "type complex64"),
        (tensor_meta(dtype=29), UnsupportedModelError, "type float8_e4m3fn"),
        (tensor_meta(dtype=99), UnsupportedModelError, "type number 99"),
        (tensor_meta(dtype=7.0), CheckpointError, "not an integer"),
        (tensor_meta(layout=1), UnsupportedModelError, "sparse layout 1"),
        (payload(tensor_meta=None), CheckpointError, "not an object"),
        (payload(path_name="../x"), UnsafeInputError, r"odd path \.\./x"),
        (payload(path_name="/etc/passwd"), UnsafeInputError, "odd path"),
        (payload(path_name="..\\x"), UnsafeInputError, "odd path"),
        (payload(path_name=""), UnsafeInputError, "odd path"),
        (payload(path_name="weight_99"), CheckpointError, "no member"),
        (payload(path_name=3), CheckpointError, "not text"),
        (payload(use_pickle=1), CheckpointError, "not a boolean"),
        (lambda r: r["config"].pop("0.weight"), CheckpointError, "does not list it"),
        (lambda r: r["config"].update({"0.weight": 1}), CheckpointError, "not an object"),
    ],
)
def test_descriptions_that_lie(change, error, text):
    data = edited(small(), WEIGHTS, change)
    tracemalloc.start()
    with pytest.raises(error, match=text):
        read_pt2(data, "net.pt2")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_pickled_weights_are_refused_unopened(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary), 2)
    data = edited(small(), WEIGHTS, payload(use_pickle=True))
    data = changed(data, {"data/weights/weight_0": bomb})
    with pytest.raises(UnsafeInputError, match=r"0\.weight is stored as a pickle.*torch\.export"):
        read_pt2(data, "net.pt2")
    assert not canary.exists()


def test_pickles_that_no_weight_needs_are_not_opened(tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary), 2)

    def extra(record: Any) -> None:
        record["config"]["unused"] = {"path_name": "weight_9", "is_param": False}
        record["config"]["unused"] |= {"use_pickle": True, "tensor_meta": None}

    data = edited(small(), WEIGHTS, extra)
    parts = ("data/sample_inputs/model.pt", "data/weights/weight_9", "data/constants/opaque_obj_0")
    data = changed(data, dict.fromkeys(parts, bomb))
    assert set(arrays(data)) == set(arrays(small()))
    assert not canary.exists()


def test_truncated_anywhere():
    data = small()
    for percent in range(0, 100, 2):
        with pytest.raises(CheckpointError):
            read_pt2(data[: len(data) * percent // 100], "net.pt2")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_raise_only_typed_errors(source):
    data = bytearray(small())
    for _ in range(source.draw(st.integers(1, 3))):
        at = source.draw(st.integers(0, len(data) - 1))
        data[at] = source.draw(st.integers(0, 255))
    with contextlib.suppress(DfqError):
        read_pt2(bytes(data), "net.pt2")


def test_repeated_and_escaping_members():
    twice = io.BytesIO(small())
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(UnsafeInputError, match="same name"):
        read_pt2(twice.getvalue(), "net.pt2")
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        read_pt2(changed(small(), {"../../x": b""}), "net.pt2")


def test_zip_bombs():
    contents = {**members(small()), MODEL: b"[" + b" " * (50 << 20)}
    with pytest.raises(UnsafeInputError, match="zip bomb"):
        read_pt2(packed({**contents}, method=zipfile.ZIP_DEFLATED), "net.pt2")


def test_hostile_names_are_escaped():
    def change(record: Any) -> None:
        specs = record["graph_module"]["signature"]["input_specs"]
        specs[0]["parameter"]["parameter_name"] = "\x1b[31m<script>\n"

    with pytest.raises(CheckpointError, match=r"tensor \\x1b\[31m<script>\\n"):
        read_pt2(edited(small(), MODEL, change), "net.pt2")
