"""Both formats of `torch.save`: bit parity with PyTorch, and every number checked."""

import collections
import io
import zipfile

import numpy as np
import pytest
import torch
from torch_files import (
    FORMATS,
    RAW,
    Rebuilt,
    Stored,
    assert_same,
    floats,
    forged,
    forged_stream,
    forged_zip,
    load,
    mixed_tensors,
    rewrite,
    saved,
)

from dfq_jax.errors import CheckpointError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.readers.checkpoint import read_checkpoint

pytestmark = pytest.mark.torch
TYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_scalars_and_shared_storages(form, protocol, tmp_path):
    tensors = mixed_tensors()
    checkpoint = load(saved(tensors, form, protocol), tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.notes == ()


def test_stream_of_protocol_1(tmp_path):
    tensors = mixed_tensors()
    assert_same(load(saved(tensors, "stream", 1), tmp_path), tensors)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type(form, dtype, tmp_path):
    if form == "stream" and dtype in (torch.uint16, torch.uint32, torch.uint64):
        pytest.skip("younger than the stream format")
    values = torch.arange(-3, 9) if dtype.is_signed else torch.arange(0, 12)
    tensors = {"a": values.to(dtype).reshape(3, 4), "b": values.to(dtype).reshape(3, 4).t()}
    assert_same(load(saved(tensors, form), tmp_path), tensors)


@pytest.mark.parametrize("form", FORMATS)
def test_state_dict_with_parameters_and_metadata(form, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = net.state_dict()
    assert vars(state)["_metadata"]  # set by BUILD on the OrderedDict
    assert_same(load(saved(state, form), tmp_path), state)
    parameters = dict(net.named_parameters())
    assert_same(load(saved(parameters, form), tmp_path), parameters)


def test_equal_parts_share_one_array(tmp_path):
    weight = torch.randn(100, 100)
    checkpoint = load(saved({"encoder": weight, "decoder": weight, "t": weight.t()}), tmp_path)
    assert checkpoint.tensors["encoder"] is checkpoint.tensors["decoder"]
    assert checkpoint.tensors["t"] is not checkpoint.tensors["encoder"]


def test_big_endian_storages(tmp_path):
    tensors = {k: v for k, v in mixed_tensors().items() if v.dtype == torch.float32 and v.numel()}
    tensors["half"] = torch.randn(3).bfloat16()
    data = saved(tensors)
    archive = zipfile.ZipFile(io.BytesIO(data))
    swapped: dict[str, bytes | None] = {"byteorder": b"big"}
    for name in archive.namelist():
        if "/data/" in name:
            content = archive.read(name)
            width = 2 if len(content) == 6 else 4
            swapped["data/" + name.rsplit("/", 1)[1]] = (
                np.frombuffer(content, f"u{width}").byteswap().tobytes()
            )
    assert_same(load(rewrite(data, swapped), tmp_path), tensors)


def test_any_root_missing_byteorder_and_deflate(tmp_path):
    tensors = mixed_tensors()
    path = tmp_path / "odd name.pth"
    torch.save(tensors, path)
    assert_same(read_checkpoint(path), tensors)
    data = rewrite(path.read_bytes(), {"byteorder": None}, zipfile.ZIP_DEFLATED)
    assert_same(load(data, tmp_path), tensors)


def test_files_without_checksums(tmp_path):
    tensors = mixed_tensors()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(tensors)
    finally:
        torch.serialization.set_crc32_options(True)
    assert {info.CRC for info in zipfile.ZipFile(io.BytesIO(data)).infolist()} == {0}
    assert_same(load(data, tmp_path), tensors)


def test_bad_byteorder(tmp_path):
    with pytest.raises(CheckpointError, match=r"net\.pth is damaged: byte order"):
        load(rewrite(saved({"w": torch.ones(2)}), {"byteorder": b"middle"}), tmp_path)


HUGE = 2**60
BAD_GEOMETRY = {
    "offset": (floats(), 1, (6,), (1,)),
    "size": (floats(), 0, (7,), (1,)),
    "stride": (floats(), 0, (2, 2), (5, 1)),
    "huge numel": (floats(), 0, (HUGE,), (1,)),
    "huge storage": (floats(numel=HUGE), 0, (HUGE,), (1,)),
    "huge shape": (floats(), 0, (2**30, 2**30, 2**30), (0, 0, 0)),
    "huge offset": (floats(), HUGE, (1,), (1,)),
    "beyond 64 bits": (floats(), 2**70, (1,), (1,)),
    "negative stride": (floats(), 5, (6,), (-1,)),
    "negative offset": (floats(), -1, (2,), (1,)),
    "negative size": (floats(), 0, (-1,), (1,)),
    "rank mismatch": (floats(), 0, (2, 3), (1,)),
    "rank 40": (floats(), 0, (1,) * 40, (1,) * 40),
    "bool size": (floats(), 0, (True,), (1,)),
    "float size": (floats(), 0, (2.0,), (1,)),
    "text size": (floats(), 0, "ab", (1,)),
    "list offset": (floats(), [], (1,), (1,)),
    "empty but huge": (floats(), 0, (0, 2**40, 2**40), (1, 1, 1)),
    "storage too short": (floats(numel=7), 0, (6,), (1,)),
    "no such storage": (floats("9"), 0, (6,), (1,)),
    "bad key": (Stored(torch.FloatStorage, ("0",), "cpu", 6, None), 0, (6,), (1,)),
    "bad numel": (floats(numel=-6), 0, (6,), (1,)),
    "bad kind": (Stored(collections.OrderedDict, "0", "cpu", 6, None), 0, (6,), (1,)),
    "bad view": (Stored(torch.FloatStorage, "0", "cpu", 6, ("v", 4, 4)), 0, (4,), (1,)),
    "bad view offset": (Stored(torch.FloatStorage, "0", "cpu", 6, ("v", -4, 4)), 0, (4,), (1,)),
    "short id": (Stored(torch.FloatStorage), 0, (6,), (1,)),
    "no storage": ("storage", 0, (6,), (1,)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", sorted(BAD_GEOMETRY))
def test_every_number_is_checked_before_allocation(form, case, tmp_path):
    good = Rebuilt(floats(), 0, (2, 3), (3, 1))
    value = {"good": good, "bad": Rebuilt(*BAD_GEOMETRY[case])}
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        load(forged(form, value), tmp_path)
    tensors = load(forged(form, {"good": good}), tmp_path).tensors
    assert tensors["good"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_message_names_tensor_and_numbers(tmp_path):
    data = forged_zip({"conv.w": Rebuilt(floats(), 1, (2, 3), (3, 1))}, {"0": RAW})
    message = r"tensor conv\.w of shape \(2, 3\) reaches element 6 of a storage of 6"
    with pytest.raises(CheckpointError, match=message):
        load(data, tmp_path)


def test_expanded_tensors_cannot_exhaust_memory(tmp_path):
    value = {"a": Rebuilt(floats(), 0, (1000, 1000, 1000), (0, 0, 0))}
    with pytest.raises(UnsafeInputError, match=r"tensor a of shape .* exceed the file many times"):
        load(forged_zip(value, {"0": RAW}), tmp_path)
    many = {str(i): Rebuilt(floats(), 0, (300_000 - i,), (0,)) for i in range(100)}
    with pytest.raises(UnsafeInputError, match="exceed the file"):
        load(forged_zip(many, {"0": RAW}), tmp_path)


def test_storage_views_of_old_stream_files(tmp_path):
    view = Stored(torch.FloatStorage, "0", "cpu", 6, ("v", 2, 3))
    value = {"part": Rebuilt(view, 1, (2,), (1,)), "all": Rebuilt(floats(), 0, (6,), (1,))}
    tensors = load(forged_stream(value, {"0": (6, RAW)}), tmp_path).tensors
    assert tensors["part"].tolist() == [3, 4]
    assert tensors["all"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [-1, 7, HUGE, -HUGE])
def test_stream_storage_counts(count, tmp_path):
    data = forged_stream({"w": Rebuilt(floats(), 0, (6,), (1,))}, {"0": (count, RAW)})
    with pytest.raises(CheckpointError, match=rf"storage 0 at byte \d+ has {count} elements"):
        load(data, tmp_path)


@pytest.mark.parametrize("metadata", [{"neg": True}, {"conj": True}])
def test_lazy_negation_is_not_ignored(metadata, tmp_path):
    tensor = Rebuilt(floats(), 0, (6,), (1,))
    tensor.args = (*tensor.args, metadata)
    with pytest.raises(UnsupportedModelError, match="tensor w has type FloatStorage and lazy"):
        load(forged_zip({"w": tensor}, {"0": RAW}), tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str)
def test_unsupported_types(dtype, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"tensor w has type .*not supported"):
        load(saved({"w": torch.zeros(2).to(dtype)}), tmp_path)
    beside = {"state_dict": {"w": torch.ones(2)}, "extra": {"z": torch.zeros(2).to(dtype)}}
    assert_same(load(saved(beside), tmp_path), {"w": torch.ones(2)})
