"""Files of weights made by hand to run code, leave their folder, or exhaust the machine."""

import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import forged
import mutations
import numpy as np
from forged import entry, named, number, pickled, sequence, storage, tensor, text

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError

FLOATS = np.arange(6, dtype="<f4").tobytes()
HUGE = 2**60
HASHED = 2**61 - 1  # numbers this far apart have the same hash


class Hostile(NamedTuple):
    """One file: its bytes (made beside other files in a folder), and how it is to be refused."""

    reader: str
    make: Callable[[Path], bytes]
    error: type[DfqError]
    match: str


CORPUS: dict[str, Hostile] = {}


def hostile(reader: str, error: type[DfqError], match: str) -> Callable:
    """Enters a function into the corpus, under its own name."""

    def enter(make: Callable[[], bytes]) -> Callable[[], bytes]:
        CORPUS[f"{reader}: {make.__name__}"] = Hostile(reader, lambda _: make(), error, match)
        return make

    return enter


def add(reader: str, title: str, data: bytes, error: type[DfqError], match: str) -> None:
    """Enters bytes into the corpus."""
    CORPUS[f"{reader}: {title}"] = Hostile(reader, lambda _: data, error, match)


# .pth: code

COMMAND = text(mutations.RUN)
EVIL = named("os", "system") + COMMAND + b"\x85R"
CODE = {
    "reduce": EVIL,
    "stack global": text("os") + text("system") + b"\x93" + COMMAND + b"\x85R",
    "names from the memo": text("os") + b"q\1" + text("system") + b"q\0000h\1h\0\x93" + COMMAND
    + b"\x85R",
    "inst": b"(" + COMMAND + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\n" + COMMAND + b"o",
    "newobj": named("os", "system") + COMMAND + b"\x85\x81",
    "newobj with keywords": named("subprocess", "Popen") + COMMAND + b"\x85}\x92",
    "build": named("argparse", "Namespace") + b")\x81" + named("os", "environ") + b"b",
    "extension 1": b"\x82\1", "extension 2": b"\x83\1\0", "extension 4": b"\x84\1\0\0\0",
    "dotted name": named("torch", "os.system") + COMMAND + b"\x85R",
    "other module": named("torch.hub", "load") + COMMAND + b"\x85R",
    "a socket": named("socket", "create_connection") + COMMAND + b"\x85R",
    "an import": named("importlib", "import_module") + text("antigravity") + b"\x85R",
    "as a key": b"}" + EVIL + b"K\1s",
    "in a persistent id": sequence(text("storage"), EVIL) + b"Q",
    "after a broken operation": b"]\xff\xff" + EVIL,
    "in a pickle in a pickle": b"B" + struct.pack("<I", len(pickled(EVIL))) + pickled(EVIL)
    + named("pickle", "loads") + b"h\1\x85R",
}  # fmt: skip
for title, body in CODE.items():
    add("pth", f"code by {title}", forged.checkpoint(body, {}), UnsafeInputError, "would run code")
    if title in ("reduce", "inst", "dotted name"):
        keys = forged.stream(b"}", body, b"")
        add("pth", f"code by {title} (stream)", keys, UnsafeInputError, "would run code")

# .pth: numbers

for title, body, message in (
    ("numel", tensor(storage("0", HUGE), (HUGE,)), "claims shape"),
    ("strides", tensor(storage(), (2, 3), (2**40, 1)), "reaches element"),
    ("negative stride", tensor(storage(), (6,), (-1,)), "negative"),
    ("offset", tensor(storage(), (6,), (1,), 2**61), "reaches element"),
    ("storage", tensor(storage("0", 2**61), (6,)), "needs .* bytes of storage"),
    ("empty", tensor(storage(), (0, 2**40, 2**40), (1, 1, 1)), "claims shape"),
):
    data = forged.checkpoint(forged.mapping({"w": body}), {"0": FLOATS})
    add("pth", f"huge {title}", data, CheckpointError, message)


@hostile("pth", UnsafeInputError, "exceed the file many times over")
def expanded() -> bytes:
    tensors = {str(n): tensor(storage(), (2**21 + n,), (0,)) for n in range(9)}
    return forged.checkpoint(forged.mapping(tensors), {"0": FLOATS})


# .pth: work and memory


def doubling(levels: int) -> bytes:
    """A list of two times the list before: small in memory, endless once written out."""
    return b"](NNeq\0" + b"0](h\0h\0eq\0" * levels


def nested(levels: int) -> bytes:
    """A list within lists."""
    return b"]" * levels + b"a" * (levels - 1)


add("pth", "keys that double", forged.stream(b"}", b"](" + doubling(60) + b"e", b""),
    CheckpointError, "no tensor uses storage")  # fmt: skip
add("pth", "keys within keys", forged.stream(b"}", b"](" + nested(90_000) + b"e", b""),
    CheckpointError, "no tensor uses storage")  # fmt: skip
add("pth", "values that double", forged.checkpoint(doubling(60), {}), CheckpointError, "no weights")
add("pth", "values within values", forged.checkpoint(nested(200_000), {}), CheckpointError, "no we")
add("pth", "long integer", forged.checkpoint(b"\x8b\xff\xff\xff\x7f1", {}), CheckpointError,
    "more bytes expected")  # fmt: skip
add("pth", "long digits", forged.checkpoint(b"I" + b"9" * 60_000 + b"\n", {}), CheckpointError,
    "ValueError")  # fmt: skip
add("pth", "memo at 2^31", forged.checkpoint(b"Nr\xff\xff\xff\x7fj\xfe\xff\xff\x7f", {}),
    CheckpointError, "KeyError")  # fmt: skip


@hostile("pth", CheckpointError, "no weights")
def objects_within_objects() -> bytes:
    count = 150_000
    return forged.checkpoint(b"ca\nb\nq\0" + b"h\0" * count + b"N" + b"\x85R" * count, {})


@hostile("pth", UnsafeInputError, "more than 1,500,000 pickle operations")
def too_many_operations() -> bytes:
    return forged.checkpoint(b"N0" * 800_000, {})


@hostile("pth", UnsafeInputError, "a name of 500,004 characters")
def long_names_from_the_memo() -> bytes:
    names = (b"h\0X\4\0\0\0%04x\x930" % at for at in range(60_000))
    return forged.checkpoint(text("a." + "b" * 499_998) + b"q\0" + b"".join(names), {})


@hostile("pth", CheckpointError, "a storage with a bad key")
def long_keys_from_the_memo() -> bytes:
    key = "k" * 60_000
    store = (
        sequence(text("storage"), named("torch", "FloatStorage"), b"h\0", b"N", number(6)) + b"Q"
    )
    tensors = {str(at): tensor(store, (1,), (1,), at) for at in range(6)}
    root = text(key) + b"q\x000" + forged.mapping(tensors)
    return forged.checkpoint(root, {key: bytes(40_000)})


@hostile("pth", CheckpointError, "no place in the memo")
def memo_of_equal_hashes() -> bytes:
    return forged.checkpoint(b"N" + b"".join(b"p%d\n" % (HASHED * n) for n in range(1, 50_000)), {})


@hostile("pth", CheckpointError, "reaches element")
def empty_tensors_of_equal_hashes() -> bytes:
    steps = number(1) + b"q\1" + b"0" + number(HASHED + 1) + b"q\2" + b"0"
    size = sequence(b"K\0", *[b"K\2"] * 14) + b"q\3" + b"0"
    store = storage() + b"q\4" + b"0" + named("torch._utils", "_rebuild_tensor_v2") + b"q\5" + b"0"
    tensors = [text("w")]
    for at in range(2**14):
        stride = sequence(b"h\1", *(b"h\2" if at >> bit & 1 else b"h\1" for bit in range(14)))
        tensors.append(b"h\5" + sequence(b"h\4", b"K\0", b"h\3", stride) + b"R" + text(f"w{at}"))
    bad = tensor(storage(), (7,), (1,))
    return forged.checkpoint(
        steps + size + store + b"}(" + b"".join(tensors) + bad + b"u", {"0": FLOATS}
    )


@hostile("pth", CheckpointError, "is no checkpoint")
def many_starts_of_pickles() -> bytes:
    return b"\0" + (b"\x80\x02" + b"]" * 16_000) * 32


@hostile("pth", CheckpointError, "is no checkpoint")
def many_starts_of_names() -> bytes:
    return b"\0" + b"c" * (1 << 19)


# zip archives, as .pth and as .pt2

ZIPPED = forged.small_checkpoint("zip")


def deflated(size: int) -> bytes:
    """A checkpoint with a member of that many zeros."""
    return forged.checkpoint(b"}", {"0": bytes(size)}, zipfile.ZIP_DEFLATED)


add("pth", "zip bomb", deflated(30_000_000), UnsafeInputError, "refused as a zip bomb")


@hostile("pth", UnsafeInputError, "unpacks to more than the 3 bytes it claims")
def zip_bomb_that_lies() -> bytes:
    data = bytearray(forged.packed({"data.pkl": bytes(30_000_000)}, zipfile.ZIP_DEFLATED))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<L", 3)
    return bytes(data)


def many_members(count: int, extra: bytes = b"") -> bytes:
    """An archive whose directory repeats one member."""
    data = forged.packed({"data.pkl": pickled(b"}")})
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    listed = data[at : at + 30] + struct.pack("<H", len(extra)) + data[at + 32 : end] + extra
    told = min(count, 0xFFFF)
    tail = struct.pack("<HHLL", told, told, count * len(listed), at)
    return data[:at] + listed * count + data[end : end + 8] + tail + b"\0\0"


add("pth", "10^5 members", many_members(100_001), UnsafeInputError, "more than 100,000 members")
add("pth", "repeated members", many_members(3), UnsafeInputError, "several members of the same")
add("pth", "long extra fields", many_members(100, bytes(65_532)), UnsafeInputError, "extra fields")
add("pth", "a member outside", forged.packed({"data.pkl": b"", "../../x": b""}), UnsafeInputError,
    "outside its folder")  # fmt: skip
add("pth", "an absolute member", forged.packed({"/etc/x": b""}, root=""), UnsafeInputError,
    "outside its folder")  # fmt: skip
add("pth", "a zip in a zip", forged.packed({"data.pkl": ZIPPED}), CheckpointError, "is damaged")


@hostile("pth", UnsafeInputError, "refused as a zip bomb")
def members_that_overlap() -> bytes:
    size = 1_000_000
    empty = {f"data/{at:02}": b"" for at in range(50)}
    data = bytearray(forged.packed(empty | {"data.pkl": bytes(size)}))
    for at in [found.start() for found in re.finditer(b"PK\1\2", data)]:
        data[at + 20 : at + 28] = struct.pack("<LL", size, size)
    return bytes(data)


# .safetensors


def header(title: str, content: Any, error: type[DfqError], match: str) -> None:
    """A `.safetensors` file with six floats."""
    add("safetensors", title, forged.safetensors(content, FLOATS), error, match)


ONE = b'"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'
add("safetensors", "header of 2^40", struct.pack("<Q", 2**40) + b"{}", CheckpointError, "should ha")
add("safetensors", "header of 2^63", struct.pack("<Q", 2**63) + b"{}", CheckpointError, "should ha")
add("safetensors", "header of 17 MiB", forged.safetensors(b" " * (17 << 20)), UnsafeInputError,
    "has a header of 17825792 bytes")  # fmt: skip
header("overlap", {"a": entry((4,), 0, 16), "b": entry((4,), 8, 24)}, CheckpointError, "overlaps")
header("hole", {"a": entry((1,), 0, 4), "b": entry((1,), 20, 24)}, CheckpointError, "a hole")
header("reversed", {"a": entry((6,), 24, 0)}, CheckpointError, "needs 24 bytes")
header("repeated key", b"{" + ONE + b"," + ONE + b"}", CheckpointError, "a key is given twice")
header("2^60 elements", {"w": entry((HUGE,), 0, 24)}, CheckpointError, "has shape")
header("2^90 elements", {"w": entry((2**45, 2**45), 0, 24)}, CheckpointError, "claims shape")
header("negative", {"w": entry((-6,), 0, -24)}, CheckpointError, "has shape")
header(
    "NaN",
    {"w": entry([], 0, 24) | {"shape": [float("nan")]}},
    CheckpointError,
    "NaN where a number",
)
header("deep", b'{"w":' + b"[" * 200_000, CheckpointError, "recursion")
header("deep shape", ONE.join((b"{", b"}")).replace(b"[6]", b"[" * 900 + b"]" * 900),
       CheckpointError, "has shape")  # fmt: skip
header("long number", b'{"w": ' + b"9" * 100_000 + b"}", CheckpointError, "no valid JSON")
header("strange type", {"w": entry((6,), 0, 24, "../x")}, UnsupportedModelError, "not supported")
header("no text", b'{"w\xff": 1}', CheckpointError, "no valid JSON")


@hostile("safetensors", UnsafeInputError, "header of over 1,000,000 values")
def two_million_objects() -> bytes:
    shape = b"[" + b'{"":1},' * 2_000_000 + b"1]"
    return forged.safetensors(b"{" + ONE.replace(b"[6]", shape) + b"}", FLOATS)
