"""The data-only pickle interpreter: parity with `pickle` on data, refusal of everything else."""

import argparse
import collections
import contextlib
import datetime
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError
from dfq_jax.io.readers.pickle_data import hidden_globals, load_pickle
from dfq_jax.io.readers.pickle_policy import means_code
from dfq_jax.io.readers.pickle_values import Boxed, Global, Object

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=5)
    ),
    max_leaves=20,
)


class Canary:
    """Creates a file when unpickled by a careless reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Settings:
    """Some class of a training script."""

    def __init__(self) -> None:
        self.rate = 0.1


def value_of(data: bytes):
    return load_pickle(data, "x.pkl")[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@settings(max_examples=40, deadline=None)
@given(value=PLAIN)
def test_plain_data_reads_as_pickle_reads_it(protocol, value):
    assert value_of(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [0, 1])
@pytest.mark.parametrize(
    "value", [1, -5, 2**80, True, False, None, 1.5, "text", "ü€", [1, (2, {})]]
)
def test_text_protocols_read_as_pickle_reads_them(protocol, value):
    result = value_of(pickle.dumps(value, protocol))
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_known_collections_become_plain_data(protocol):
    saved = {
        "ordered": collections.OrderedDict(a=1, b=2),
        "default": collections.defaultdict(list, c=[3]),
        "counter": collections.Counter("aab"),
        "set": {7},
        "frozen": frozenset([8]),
    }
    result = value_of(pickle.dumps(saved, protocol))
    assert result["ordered"] == {"a": 1, "b": 2}
    assert list(result["ordered"]) == ["a", "b"]
    assert result["default"] == {"c": [3]}
    assert result["counter"] == {"a": 2, "b": 1}
    assert list(result["set"]) == [7]
    assert list(result["frozen"]) == [8]


def test_python_2_ordered_dict_and_byte_strings():
    pairs = b"(lp0\n(lp1\nS'w'\naI1\naa"
    assert value_of(b"ccollections\nOrderedDict\n(" + pairs + b"tR.") == {"w": 1}
    assert value_of(b"U\x02hi.") == "hi"
    assert value_of(b"U\x01\xff.") == "\xff"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_objects_stay_inert(protocol):
    saved = [argparse.Namespace(lr=0.1), Settings(), datetime.date(2020, 1, 2), Path("/tmp")]
    value, names = load_pickle(pickle.dumps(saved, protocol), "x.pkl")
    assert all(type(item) is Object for item in value)
    assert value[0].state == {"lr": 0.1}
    assert value[1].state == {"rate": 0.1}
    assert Global("argparse", "Namespace") in names
    assert any(name.name == "Settings" for name in names)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("value", [b"", b"abc", bytes(300)])
def test_bytes_read_as_pickle_reads_them(protocol, value):
    assert value_of(pickle.dumps(value, protocol)) == value


def test_odd_keys_are_boxed_and_never_hashed():
    data = b"}" + b")" + b"\x85" * 50_000 + b"K\x01s."
    result = value_of(data)
    (key,) = result
    assert type(key) is Boxed
    assert type(key.key) is tuple


def unsafe_streams(path: Path) -> dict[str, bytes]:
    """Pickles that run `touch path` in a real unpickler, one per way of saying so."""
    command = f"touch {path}".encode()
    short = struct.pack("<B", len(command))
    streams = {f"reduce-{p}": pickle.dumps(Canary(path), p) for p in range(6)}
    streams["after data"] = pickle.dumps([{"w": [1.0] * 100}, Canary(path)], 2)
    streams["inst"] = b"(S'" + command + b"'\niposix\nsystem\n."
    streams["obj"] = b"(cposix\nsystem\nS'" + command + b"'\no."
    streams["newobj"] = b"\x80\x02cposix\nsystem\nU" + short + command + b"\x85\x81."
    streams["memo"] = (
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93\x8c"
        + short
        + command
        + b"\x85R."
    )
    streams["dotted"] = (
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c" + short + command + b"\x85R."
    )
    streams["broken before the end"] = pickle.dumps(Canary(path), 2)[:-1] + b"\xff\xff"
    return streams


UNSAFE = sorted(unsafe_streams(Path("x")))


@pytest.mark.parametrize("kind", UNSAFE)
def test_code_is_refused_and_never_runs(kind, tmp_path):
    canary = tmp_path / "canary"
    data = unsafe_streams(canary)[kind]
    with pytest.raises(UnsafeInputError, match=r"(posix|torch\.os)\.system.*Nothing was executed"):
        load_pickle(data, "x.pkl")
    assert not canary.exists()


@pytest.mark.parametrize("kind", [k for k in UNSAFE if k not in ("dotted", "newobj")])
def test_the_canaries_do_sing_in_a_real_unpickler(kind, tmp_path):
    canary = tmp_path / "canary"
    try:
        pickle.loads(unsafe_streams(canary)[kind])
    except pickle.UnpicklingError:
        assert kind == "broken before the end"
    assert canary.exists()


@pytest.mark.parametrize("junk", [b"", b"\x00\xff garbage", b"." * 50])
def test_code_in_a_second_pickle_is_found(junk, tmp_path):
    for kind, data in unsafe_streams(tmp_path / "canary").items():
        if junk and data[:1] != b"\x80" and kind != "inst":
            continue
        with pytest.raises(UnsafeInputError, match="system"):
            load_pickle(pickle.dumps({"a": 1}, 2) + junk + data, "x.pkl")
    assert not (tmp_path / "canary").exists()


def test_all_names_of_code_are_listed():
    data = b"(cos\nsystem\ncbuiltins\neval\ncnumpy\nndarray\ncsubprocess\nPopen\nt."
    with pytest.raises(
        UnsafeInputError, match=r"os\.system, builtins\.eval, subprocess\.Popen\. N"
    ):
        load_pickle(data, "x.pkl")


def test_trailing_harmless_bytes_are_damage():
    with pytest.raises(CheckpointError, match=r"x\.pkl is damaged: at byte 3.*4 bytes follow"):
        load_pickle(b"K\x01.junk", "x.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x02osU\x01a\x85\x93.",  # a name that is a tuple
        b"cbuiltins\nstr\nU\x05posix\x85RU\x06system\x93.",  # a name that is computed
    ],
)
def test_computed_names_are_refused(data):
    with pytest.raises(UnsafeInputError, match="computes the name"):
        load_pickle(data, "x.pkl")


def test_extension_codes_are_refused():
    with pytest.raises(UnsafeInputError, match="extension_7"):
        load_pickle(b"\x80\x02\x82\x07.", "x.pkl")


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("os", "system", True),
        ("nt", "system", True),
        ("__builtin__", "eval", True),
        ("builtins", "getattr", True),
        ("importlib.metadata", "distribution", True),
        ("functools", "reduce", True),
        ("torch.hub", "load", True),
        ("torch.storage", "_load_from_bytes", True),
        ("numpy.testing._private.utils", "runstring", True),
        ("pip", "main", True),
        ("lib2to3.pgen2.pgen", "ParserGenerator", True),
        ("mypackage", "sys.modules", True),
        ("enum", "Enum.__class__", True),
        ("functools", "partial", False),
        ("argparse", "Namespace", False),
        ("pathlib._local", "PosixPath", False),
        ("__builtin__", "set", False),
        ("torch._utils", "_rebuild_tensor_v2", False),
        ("numpy", "dtype", False),
        ("__main__", "Config", False),
        ("mypackage.os", "Config", False),
        ("mypackage", "Outer.Inner", False),
    ],
)
def test_policy(module, name, expected):
    assert means_code(module, name) is expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1 more bytes expected, 0 left"),
        (b"K\x01", "cut short"),
        (b"\xff.", "unknown operation 0xff"),
        (b"h\x05.", "KeyError"),
        (b"t.", "IndexError"),
        (b"K\x01K\x02a.", "appended to int"),
        (b"K\x01K\x02K\x03s.", "items set on int"),
        (b"}(K\x01u.", "ValueError"),
        (b"B\xff\xff\xff\xffxx.", "4294967295 more bytes"),
        (b"\x8e" + b"\xff" * 8 + b"xx.", "more bytes expected"),
        (b"\x8b\x00\x01\x00\x00" + b"\x01" * 256 + b".", "integer of 256 bytes"),
        (b"\x8b\xff\xff\xff\xff.", "-1 more bytes"),
        (b"\x80\x09.", "protocol 9"),
        (b"X\x01\x00\x00\x00\xff.", "UnicodeDecodeError"),
        (b"I" + b"1" * 70_000, "text argument without end"),
        (b"I" + b"1" * 5_000 + b"\n.", "ValueError"),
        (b"S'a\\x41'\n.", "plain quotes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "TypeError"),
    ],
)
def test_damage_is_reported_with_its_position(data, message):
    with pytest.raises(CheckpointError, match=rf"x\.pkl is damaged: at byte \d+.*{message}"):
        load_pickle(data, "x.pkl")


def test_names_from_the_file_cannot_reach_the_terminal():
    with pytest.raises(UnsafeInputError) as caught:
        load_pickle(b"cos\n\x1b[31m" + b"a" * 500 + b"\n.", "x.pkl")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


BOMBS = """
import pathlib, re, time
from dfq_jax.errors import DfqError
from dfq_jax.io.readers.pickle_data import load_pickle
call = b"h\\x00\\x85R0"
for data in (
    b"}" * 5_000_000,
    b"(" * 5_000_000,
    b"]q\\x00" + b"h\\x00h\\x00a" * 1_000_000,
    b"(" + b"K\\x01" * 300_000 + b"tq\\x00" + (b"cbuiltins\\nlist\\n" + call) * 200_000,
    b"](" + b"]K\\x01aK\\x01a" * 100_000 + b"eq\\x00" + (b"cbuiltins\\ndict\\n" + call) * 90_000,
):
    start = time.process_time()
    try:
        load_pickle(data + b"\\xff", "x.pkl")
    except DfqError as error:
        print(type(error).__name__, time.process_time() - start)
status = pathlib.Path("/proc/self/status")  # getrusage would report the parent's peak
peak = re.search(r"VmHWM:\\s+(\\d+)", status.read_text()) if status.exists() else None
print("peak", int(peak[1]) / 1024 if peak else 0)
"""


def test_bombs_end_soon_and_small():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BOMBS], cwd=root, capture_output=True, text=True, check=True
    )
    *bombs, peak = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in bombs] == ["UnsafeInputError"] * 3 + ["CheckpointError"] * 2
    assert max(float(seconds) for _, seconds in bombs) < 5  # 1 s on a quiet machine
    assert float(peak[1]) < 500


def test_nested_wrappers_do_not_recurse():
    wrap = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    nest = b"(" + wrap + b"Nh\x00Nt" + b"q\x00"  # arguments that hold the previous arguments
    assert type(value_of(b")q\x00" + (nest + b"0") * 20_000 + wrap + b"h\x00R.")) is Object


def test_hidden_globals_ignore_plain_text():
    assert hidden_globals(b"import os.path\nfrom sys import path\n" * 100) == ()
    assert Global("os", "system") in hidden_globals(b"\x00\x01cos\nsystem\n(tR")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutations_end_in_data_or_a_typed_error(data):
    saved = {"a": [1, 2.5, "x"], "b": collections.OrderedDict(c=Settings()), "d": {1: (None, b"q")}}
    blob = bytearray(pickle.dumps(saved, data.draw(st.sampled_from([0, 2, 4]))))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DfqError):
        load_pickle(bytes(blob), "x.pkl")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_data_or_a_typed_error(blob):
    with contextlib.suppress(DfqError):
        load_pickle(blob, "x.pkl")
