"""Both formats of `torch.save`: bit parity with PyTorch, and what must be refused."""

import collections
import contextlib
import io
import itertools
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._utils
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.checkpoint import Checkpoint, read_checkpoint
from dfq_jax.io.torch_checkpoint import MAGIC_NUMBER
from dfq_jax.io.zip_members import ZipMembers

pytestmark = pytest.mark.torch
REBUILD = vars(torch._utils)["_rebuild_tensor_v2"]
FORMATS = ["zip", "stream"]
TYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64),
]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Canary:
    """Creates a file when unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def saved(value: object, form: str = "zip", protocol: int = 2) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(
        value,
        buffer,
        _use_new_zipfile_serialization=form == "zip",
        pickle_protocol=protocol,
    )
    return buffer.getvalue()


def load(data: bytes, folder: Path, name: str = "net.pth") -> Checkpoint:
    """Reads bytes through a file."""
    path = folder / name
    path.write_bytes(data)
    return read_checkpoint(path)


def assert_same(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit, with shapes, types and order."""
    assert list(checkpoint.tensors) == list(tensors)
    for name, tensor in tensors.items():
        got = checkpoint.tensors[name]
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).numpy()
        assert got.shape == tuple(tensor.shape), name
        assert got.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert got.tobytes() == bits.tobytes(), name
        assert got.flags.c_contiguous
        assert not got.flags.writeable


def rewrite(
    data: bytes, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The same archive with members (named without the root) replaced, added or left out."""
    source = zipfile.ZipFile(io.BytesIO(data))
    root = source.namelist()[0].split("/")[0]
    members = {name.removeprefix(root + "/"): source.read(name) for name in source.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in (members | changes).items():
            if content is not None:
                target.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "conv.weight": torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": base.t(),
        "column": base[:, 2],
        "strided": base[::2, 1::3],
        "tail": base[2:],
        "shared": base,
        "expanded": torch.randn(3, 1).expand(3, 4),
        "windows": torch.arange(10.0).unfold(0, 4, 2),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(0),
        "one": torch.randn(1, 1, 1),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


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


class Pickler(pickle.Pickler):
    """Writes `Stored` as PyTorch writes storages."""

    def persistent_id(self, obj):
        return ("storage", *obj.parts) if isinstance(obj, Stored) else None


class Stored:
    """A storage reference of any content."""

    def __init__(self, *parts: object):
        self.parts = parts


class Rebuilt:
    """A tensor description of any content."""

    def __init__(self, storage: object, offset: object, size: object, stride: object):
        self.args: tuple = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return REBUILD, self.args


def dump(value: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def forged_zip(value: object, storages: dict[str, bytes]) -> bytes:
    """A zip checkpoint of any content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", dump(value))
        for key, content in storages.items():
            target.writestr(f"archive/data/{key}", content)
    return buffer.getvalue()


def forged_stream(value: object, storages: dict[str, tuple[int, bytes]]) -> bytes:
    """A stream checkpoint of any content."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(map(dump, (MAGIC_NUMBER, 1001, system, value, list(storages))))
    return head + b"".join(struct.pack("<q", n) + raw for n, raw in storages.values())


def floats(key: str = "0", numel: object = 6) -> Stored:
    return Stored(torch.FloatStorage, key, "cpu", numel, None)


RAW = np.arange(6, dtype="<f4").tobytes()
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


def forged(form: str, value: object) -> bytes:
    """A checkpoint of either format with one storage of six floats."""
    if form == "zip":
        return forged_zip(value, {"0": RAW})
    return forged_stream(value, {"0": (6, RAW)})


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


def canary_files(canary: Path) -> dict[str, bytes]:
    tensors = mixed_tensors()
    evil = pickle.dumps(Canary(canary), 2)
    inst = b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n."
    plain = saved(tensors)
    inner = zipfile.ZipFile(io.BytesIO(plain))
    pkl = inner.read(f"{inner.namelist()[0].split('/')[0]}/data.pkl")
    files = {}
    for form, protocol in itertools.product(FORMATS, (2, 4)):
        files[f"{form} {protocol} alone"] = saved(Canary(canary), form, protocol)
        files[f"{form} {protocol} after"] = saved({**tensors, "x": Canary(canary)}, form, protocol)
        beside = {"state_dict": tensors, "args": [Canary(canary)]}
        files[f"{form} {protocol} beside"] = saved(beside, form, protocol)
    files["zip trailing"] = rewrite(plain, {"data.pkl": pkl + evil})
    files["zip trailing broken"] = rewrite(plain, {"data.pkl": pkl + b"\xff\xff" + evil})
    files["zip broken"] = rewrite(plain, {"data.pkl": evil[:-1] + b"\xff"})
    files["zip inst"] = rewrite(plain, {"data.pkl": inst})
    files["zip protocol 0"] = rewrite(plain, {"data.pkl": pickle.dumps(Canary(canary), 0)})
    stream = saved(tensors, "stream")
    files["stream trailing"] = stream + evil
    files["stream trailing broken"] = stream + b"\x00\xff." + evil
    files["stream trailing inst"] = stream + inst
    files["stream system info"] = dump(MAGIC_NUMBER) + dump(1001) + evil + stream
    keys = stream.rindex(b"\x80\x02]")  # the list of storage keys
    files["stream keys"] = stream[:keys] + evil
    for protocol in (0, 2, 4):
        files[f"plain pickle {protocol}"] = pickle.dumps(Canary(canary), protocol)
    files["plain inst"] = inst
    return files


def test_code_is_refused_and_never_runs(tmp_path):
    canary = tmp_path / "canary"
    for name, data in canary_files(canary).items():
        with pytest.raises(UnsafeInputError, match=r"posix\.system") as caught:
            load(data, tmp_path)
        assert caught.value.exit_code == 6, name
        assert not canary.exists(), name


def two_tensors(form: str) -> bytes:
    torch.manual_seed(0)
    return saved({"state_dict": {"w": torch.randn(30, 10), "b": torch.randn(3)}, "epoch": 3}, form)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_a_typed_error(form, tmp_path):
    data = two_tensors(form)
    for percent in range(100):
        with pytest.raises(CheckpointError, match=r"net\.pth"):
            load(data[: len(data) * percent // 100], tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_trailing_bytes(form, tmp_path):
    if form == "stream":
        with pytest.raises(CheckpointError, match="9 bytes follow the last storage"):
            load(two_tensors(form) + b"some junk", tmp_path)
    else:
        pkl = dump({"w": Rebuilt(floats(), 0, (6,), (1,))}) + b"junk"
        data = rewrite(forged_zip({}, {"0": RAW}), {"data.pkl": pkl})
        with pytest.raises(CheckpointError, match=r"net\.pth/data\.pkl is damaged.*4 bytes follow"):
            load(data, tmp_path)


def test_changed_bytes_fail_the_checksum(tmp_path):
    data = saved({"w": torch.arange(100.0)})
    at = data.index(np.float32(50).tobytes() + np.float32(51).tobytes())
    broken = data[:at] + b"\x01" + data[at + 1 :]
    with pytest.raises(CheckpointError, match=r"member \w+/data/0 at byte \d+: wrong checksum"):
        load(broken, tmp_path)


def archive_of(names: list[str], content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in names:
            target.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "C:/x", "a/..", "..\\x", "a\\..\\x", "a\x1bb", "~/x"],
)
def test_names_that_leave_the_folder(name, tmp_path):
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        load(archive_of(["a/data.pkl", name]), tmp_path)


def test_repeated_names(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive_of(["a/data.pkl", "a/data/0", "a/data.pkl"])
    with pytest.raises(UnsafeInputError, match="same name"):
        load(data, tmp_path)


def test_too_many_members(tmp_path):
    head = archive_of(["a/data.pkl"])
    start = head.index(b"PK\x01\x02")
    entry, end = head[start : head.index(b"PK\x05\x06")], head[head.index(b"PK\x05\x06") :]
    count = 1_000_000
    end = end[:8] + struct.pack("<HHLL", 0xFFFF, 0xFFFF, count * len(entry), start) + b"\0\0"
    data = head[:start] + entry * count + end
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="more than 100,000 members"):
        load(data, tmp_path)
    assert time.perf_counter() - begin < 3


def deflated(content: bytes) -> bytes:
    return rewrite(forged_zip({}, {}), {"data/0": content}, zipfile.ZIP_DEFLATED)


def test_declared_bomb(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="zip bomb"):
        load(deflated(bytes(100_000_000)), tmp_path)
    assert time.perf_counter() - begin < 5


def test_bomb_that_lies_about_its_size():
    data = bytearray(deflated(bytes(100_000_000)))
    at = data.rindex(b"PK\x01\x02")  # the last member
    data[at + 24 : at + 28] = struct.pack("<L", 1000)
    archive = ZipMembers(bytes(data), "net.pth")
    begin = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="more than the 1000 bytes it claims"):
        archive.read(archive.names[-1])
    assert time.perf_counter() - begin < 1


def read_first_member(data: bytes) -> None:
    archive = ZipMembers(data, "net.pth")
    archive.read(archive.names[0])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, struct.pack("<H", 1), "encrypted"),
        (10, struct.pack("<H", 12), "compression method 12"),
        (24, struct.pack("<L", 5), "two different sizes"),
        (42, struct.pack("<L", 3), "no local header"),
        (46, b"X", "another name"),
    ],
)
def test_strange_directory_entries(at, value, message, tmp_path):
    data = bytearray(archive_of(["a/data.pkl"]))
    start = data.index(b"PK\x01\x02") + at
    data[start : start + len(value)] = value
    with pytest.raises(CheckpointError, match=message):
        read_first_member(bytes(data))


def test_a_zip_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match=r"without data\.pkl.*it holds a/readme, a/photo"):
        load(archive_of(["a/readme", "a/photo"]), tmp_path)
    with pytest.raises(CheckpointError, match="empty or split zip"):
        load(archive_of([]), tmp_path)


def test_torchscript_is_refused_with_the_recipe(tmp_path):
    path = tmp_path / "net.pt"
    names = ["net/data.pkl", "net/code/__torch__/net.py", "net/constants.pkl", "net/version"]
    path.write_bytes(archive_of(names))
    with pytest.raises(UnsupportedModelError, match=r"TorchScript.*torch\.export\.save"):
        read_checkpoint(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, lambda m: [m]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_modules_are_refused_with_the_recipe(form, wrap, tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedModelError, match=r"whole pickled model.*model\.state_dict\(\)"):
        load(saved(wrap(net), form), tmp_path)


def mutate(data: st.DataObject, form: str) -> bytes:
    blob = bytearray(two_tensors(form))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(blob) - 1))
        blob[start : start + data.draw(st.integers(1, 3))] = data.draw(st.binary(max_size=4))
    return bytes(blob)


def check_mutation(data: st.DataObject, form: str, folder: Path) -> None:
    blob = mutate(data, form)
    begin = time.perf_counter()
    with contextlib.suppress(DfqError):
        load(blob, folder)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files_end_in_tensors_or_a_typed_error(form, tmp_path):
    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def run(data):
        check_mutation(data, form, tmp_path)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_many_mutated_files_end_in_tensors_or_a_typed_error(form, tmp_path):
    @settings(max_examples=10_000, deadline=None)
    @given(st.data())
    def run(data):
        check_mutation(data, form, tmp_path)

    run()
