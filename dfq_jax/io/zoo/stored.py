"""Networks that were exported once and are kept without their weights.

Each is a file of a few kilobytes beside this module: the calls of its `.pt2` archive, with a
parameter's key in the `state_dict` as its name. The weights of a checkpoint take their places, and
the importer does the rest, as for any archive. `benchmarks/store_networks.py` writes the files.
"""

import dataclasses
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.io.artifacts.graph_json import as_lists, contract_from_json, contract_to_json
from dfq_jax.io.frontends.program import Call, Program, ProgramInput, Ref
from dfq_jax.types import InputContract

FOLDER = Path(__file__).parent / "stored_graphs"
SUFFIX = ".json.gz"
REF = "$"
"""The key that marks the use of a tensor among literals."""


class Weight(NamedTuple):
    """One tensor of a PyTorch `state_dict`: its key and its shape there."""

    torch_name: str
    torch_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A network without its weights, as PyTorch traced it.

    Attributes:
      name: as in torchvision, or as its authors call it.
      contract: what an input image must be.
      image: what the program is fed; height and width are free if it takes any.
      calls: those of the program as text, which is read for the one network that is wanted.
      output: the name of what it returns.
      expected: every weight that is read.
      stem: the kernel whose second axis counts the channels of images.
      heads: weights whose first axis counts the classes; none where there are no classes.
      unread: how names of weights begin that only training reads.
      remarks: what everybody who uses it should know, in sentences.
    """

    name: str
    contract: InputContract
    image: ProgramInput
    calls: str
    output: str
    expected: tuple[Weight, ...]
    stem: str
    heads: tuple[str, ...]
    unread: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def program(self, weights: Mapping[str, np.ndarray]) -> Program:
        """Its program with these weights, by their keys."""
        calls = tuple(map(call_from_json, json.loads(self.calls)))
        paths = {key: key for key in weights}
        return Program((self.image,), weights, paths, calls, (self.output,))


def names() -> tuple[str, ...]:
    """The networks that are stored, in alphabetical order."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}")))


def read(name: str) -> Stored:
    """A stored network, by one of `names()`."""
    return unpacked(name, (FOLDER / f"{name}{SUFFIX}").read_bytes())


def packed(network: Stored) -> bytes:
    """What is stored of a network."""
    data = {
        "contract": contract_to_json(network.contract),
        "image": [network.image.name, network.image.shape],
        "calls": network.calls,
        "output": network.output,
        "weights": dict(network.expected),
        "stem": network.stem,
        "heads": network.heads,
        "unread": network.unread,
        "remarks": network.remarks,
    }
    text = json.dumps(as_lists(data), separators=(",", ":"))
    return gzip.compress(text.encode(), mtime=0)


def unpacked(name: str, data: bytes) -> Stored:
    """The network that `packed` wrote."""
    found = json.loads(gzip.decompress(data))
    image, shape = found["image"]
    return Stored(
        name=name,
        contract=contract_from_json(found["contract"]),
        image=ProgramInput(image, tuple(shape)),
        calls=found["calls"],
        output=found["output"],
        expected=tuple(Weight(key, tuple(shape)) for key, shape in found["weights"].items()),
        stem=found["stem"],
        heads=tuple(found["heads"]),
        unread=tuple(found["unread"]),
        remarks=tuple(found.get("remarks", ())),
    )


def calls_to_text(calls: Iterable[Call]) -> str:
    """Calls as `Stored` has them."""
    return json.dumps([call_to_json(call) for call in calls], separators=(",", ":"))


def call_to_json(call: Call) -> list[Any]:
    """A call as a list; labels are for messages about files, and left out."""
    args, kwargs = marked(call.args), {k: marked(v) for k, v in call.kwargs.items()}
    return [call.target, args, kwargs, list(call.outputs), call.path]


def call_from_json(data: list[Any]) -> Call:
    """The call that `call_to_json` wrote."""
    target, args, kwargs, outputs, path = data
    given = {key: plain(value) for key, value in kwargs.items()}
    return Call(target, tuple(map(plain, args)), given, tuple(outputs), path)


def marked(value: Any) -> Any:
    """An argument, uses of tensors marked among literals."""
    if isinstance(value, Ref):
        return {REF: value.name}
    return [marked(v) for v in value] if isinstance(value, tuple) else value


def plain(value: Any) -> Any:
    """The argument that `marked` made."""
    if isinstance(value, dict):
        return Ref(value[REF])
    return tuple(map(plain, value)) if isinstance(value, list) else value
