"""Weights in `.pt2` files: bit parity with PyTorch, and what layouts are read."""

import json
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from pt2_files import WEIGHTS, arrays, changed, exported, members, packed, small

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.pt2_archive import Pt2Archive
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64),
]


class Holder(torch.nn.Module):
    """Adds up whatever tensors it holds as buffers."""

    def __init__(self, tensors: dict[str, torch.Tensor], persistent: bool = True):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((b.double().sum() for b in self.buffers()), x)  # pyright: ignore


def held(tensors: dict[str, torch.Tensor], persistent: bool = True) -> bytes:
    return exported(Holder(tensors, persistent), torch.zeros(2))


def assert_same(got: dict[str, np.ndarray], tensors: dict[str, torch.Tensor]) -> None:
    """Bit for bit, with shapes and types."""
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()]).numpy()
        assert got[name].shape == tuple(tensor.shape), name
        assert got[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert got[name].tobytes() == bits.tobytes(), name
        assert not got[name].flags.writeable, name
        assert got[name].flags.aligned, name


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "channels_last": torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": base.t(),
        "column": base[:, 2],
        "strided": base[::2, 1::3],
        "tail": base[2:],
        "shared": base,
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "one": torch.randn(1, 1, 1),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


@pytest.mark.filterwarnings("ignore:No complete tensor")
@pytest.mark.parametrize("persistent", [True, False])
def test_views_scalars_and_shared_storages(persistent):
    tensors = mixed_tensors()
    assert_same(arrays(held(tensors, persistent)), tensors)


def test_weight_that_is_only_a_view():
    kernel = torch.nn.Parameter(torch.randn(6, 4).t())
    net = torch.nn.Linear(6, 4)
    net.weight = kernel
    got = arrays(exported(net, torch.zeros(1, 6)))
    assert_same(got, dict(net.state_dict()))
    assert got["weight"].strides == (4, 16)


def test_every_type():
    tensors = {}
    for dtype in TYPES:
        values = torch.arange(-3, 9) if dtype.is_signed else torch.arange(0, 12)
        name = str(dtype).removeprefix("torch.")
        tensors[f"{name}_a"] = values.to(dtype).reshape(3, 4)
        tensors[f"{name}_b"] = values.to(dtype).reshape(3, 4).t()
    assert_same(arrays(held(tensors)), tensors)


def test_weights_are_views_of_the_file():
    data = small()
    whole = np.frombuffer(data, np.uint8)
    got = arrays(data)
    assert all(np.shares_memory(array, whole) for array in got.values())
    assert all(np.shares_memory(a, whole) for a in arrays(memoryview(data)).values())
    assert_same(arrays(memoryview(bytearray(data))), {n: torch.tensor(a) for n, a in got.items()})


def test_tied_weights_are_one_array():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    got = arrays(exported(net, torch.zeros(1, 3)))
    assert_same(got, dict(net.state_dict()))
    assert got["0.weight"] is got["1.weight"]


def test_big_endian():
    tensors = {
        "w": torch.randn(3, 4).t(),
        "h": torch.randn(3).bfloat16(),
        "b": torch.tensor([True, False]),
        "n": torch.tensor(7),
    }
    data = held(tensors)
    contents: dict[str, bytes | None] = {**members(data), "byteorder": b"big"}
    for at, width in enumerate((4, 2, 1, 8)):
        raw = np.frombuffer(contents[f"data/weights/weight_{at}"] or b"", f"u{width}")
        contents[f"data/weights/weight_{at}"] = raw.byteswap().tobytes()
    assert_same(arrays(packed(contents)), tensors)


@pytest.mark.parametrize("root", ["", "n/", "an odd name/", "abc/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_root_compression_and_alignment(root, method):
    contents: dict[str, bytes | None] = {**members(small()), "byteorder": None}
    got, expected = arrays(packed(contents, root, method)), arrays(small())
    assert_same(got, {name: torch.tensor(array) for name, array in expected.items()})


def test_large_file_is_fast_and_not_copied():
    net = torch.nn.Linear(5000, 5000, bias=False)
    data = exported(net, torch.zeros(1, 5000))
    tracemalloc.start()
    started = time.perf_counter()
    got = arrays(data)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) > 100_000_000
    assert got["weight"].tobytes() == net.weight.detach().numpy().tobytes()
    assert peak < 1_000_000
    assert seconds < 1


def test_model_choice():
    contents = members(small())
    renamed = {name.replace("model", "net", 1): c for name, c in contents.items()}
    renamed = {
        ("models/net.json" if name == "nets/model.json" else name): c for name, c in renamed.items()
    }
    assert set(arrays(packed({**renamed}))) == set(arrays(small()))
    assert set(arrays(packed({**renamed, **contents}))) == set(arrays(small()))
    other = {"models/other.json": b"{}"}
    with pytest.raises(UnsupportedModelError, match=r"2 models \(net, other\) and none is called"):
        arrays(packed({**renamed, **other}))


def test_old_layouts_say_which_version_is_needed():
    old = {
        "version": b"8.7",
        "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": b"",
        "serialized_constants.pt": b"",
    }
    with pytest.raises(UnsupportedModelError, match=r"PyTorch 2\.7 or older.* PyTorch 2\.9 or"):
        read_pt2(packed({**old}, root=""), "net.pt2")
    contents: dict[str, bytes | None] = {**members(small()), WEIGHTS: None}
    contents["data/weights/model.pt"] = b""
    with pytest.raises(UnsupportedModelError, match=r"by PyTorch 2\.8, which .* PyTorch 2\.9 or"):
        read_pt2(packed(contents), "net.pt2")


def test_compiled_package():
    package = {"archive_format": b"pt2", "data/aotinductor/model/x.so": b"\x7fELF"}
    with pytest.raises(UnsupportedModelError, match="AOTInductor"):
        read_pt2(packed({**package}), "net.pt2")


def test_constants_and_weights_are_found_in_either_list():
    data = small()
    contents = members(data)
    weights = json.loads(contents[WEIGHTS])
    moved = {"config": {"1.running_mean": weights["config"].pop("1.running_mean")}}
    path = moved["config"]["1.running_mean"]["path_name"]
    changes = {
        WEIGHTS: json.dumps(weights).encode(),
        "data/constants/model_constants_config.json": json.dumps(moved).encode(),
        f"data/constants/{path}": contents[f"data/weights/{path}"],
    }
    archive = Pt2Archive(changed(data, {**changes}), "net.pt2")
    assert archive.weight("1.running_mean").shape == (4,)
    assert archive.constant("1.running_mean") is archive.weight("1.running_mean")
    assert struct.unpack("<4f", archive.constant("1.running_mean").tobytes()) == (0.0,) * 4
