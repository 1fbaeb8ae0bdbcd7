"""Model descriptions in `.pt2` files that are damaged, hostile, or from another world."""

import copy
import functools
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfq_jax.errors import CheckpointError, DfqError, UnsafeInputError, UnsupportedModelError
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch
MODEL = "models/model.json"
Change = Callable[[Any], Any]


class Small(nn.Module):
    """Three operations and a constant."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.offset = torch.arange(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.offset.view(3, 1, 1)


@functools.cache
def small() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Small().eval(), (torch.zeros(1, 3, 8, 8),))
        torch.export.save(program, buffer)
    return buffer.getvalue()


def edited(data: bytes, change: Change, replaced: tuple[str, str] = ("", "")) -> bytes:
    """The same archive with its model description changed, as a record and then as text."""
    source = zipfile.ZipFile(io.BytesIO(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(MODEL):
                record = json.loads(content)
                change(record)
                content = json.dumps(record).replace(*replaced, 1).encode()
            target.writestr(name, content)
    return buffer.getvalue()


def graph(change: Change) -> Change:
    return lambda record: change(record["graph_module"]["graph"])


def signature(change: Change) -> Change:
    return lambda record: change(record["graph_module"]["signature"])


def node(at: int, **fields: Any) -> Change:
    return graph(lambda g: g["nodes"][at].update(fields))


def arg(value: Any, name: str = "extra") -> Change:
    """Adds an argument to the first node."""
    return graph(lambda g: g["nodes"][0]["inputs"].append({"name": name, "arg": value}))


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def mapping(levels: int) -> Any:
    value: Any = {"as_int": 1}
    for _ in range(levels):
        value = {"as_string_to_argument": {"k": value}}
    return value


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda r: r.pop("graph_module"), CheckpointError, "'graph_module' is missing"),
        (lambda r: r.pop("schema_version"), CheckpointError, "'schema_version' is missing"),
        (lambda r: r["schema_version"].update(major=9), UnsupportedModelError, "version 9"),
        (graph(lambda g: g.pop("nodes")), CheckpointError, "'nodes' is missing"),
        (graph(lambda g: g.update(nodes={})), CheckpointError, "not a list"),
        (graph(lambda g: g.update(nodes=[3])), CheckpointError, "node 0 is damaged: a record"),
        (graph(lambda g: g["nodes"].pop(0)), CheckpointError, "reads 'conv2d' before anything"),
        (graph(lambda g: g["nodes"].append(g["nodes"][0])), CheckpointError, "defined twice"),
        (graph(lambda g: g["nodes"].reverse()), CheckpointError, "before anything defines it"),
        (node(0, target=3), CheckpointError, "'target' is 3, not text"),
        (node(0, inputs=None), CheckpointError, "'inputs' is None, not a list"),
        (node(0, outputs=[tensor("x")]), CheckpointError, "'x' is defined twice"),
        (node(0, outputs=[tensor("")]), CheckpointError, "an empty name"),
        (node(0, outputs=[tensor("\ud800")]), CheckpointError, "no valid text"),
        (node(0, outputs=[{"as_custom_obj": {}}]), UnsupportedModelError, "result of the unknown"),
        (arg(tensor("nowhere")), CheckpointError, "reads 'nowhere' before"),
        (arg({"as_sym_int": {"as_name": "s0"}}), CheckpointError, "reads 's0' before"),
        (arg({"as_int": 1}, "weight"), CheckpointError, "'weight' is given twice"),
        (arg({"as_int": 2**64}), CheckpointError, "over 64 bits"),
        (arg({"as_int": True}), CheckpointError, "not an integer"),
        (arg({"as_float": "1.0"}), CheckpointError, "is no number"),
        (arg({"as_none": None}), CheckpointError, "not a boolean"),
        (arg({"as_ints": [1, "2"]}), CheckpointError, "not an integer"),
        (arg({"as_new_thing": 1}), UnsupportedModelError, r"node conv2d .*unknown kind as_new"),
        (arg({"as_scalar_type": 99}), UnsupportedModelError, "unknown kind number 99"),
        (arg({"as_sym_int": {"as_expr": {}}}), UnsupportedModelError, "unknown kind as_expr"),
        (arg({"as_custom_obj": {"name": "o", "class_fqn": "a.B"}}), UnsupportedModelError, "a.B"),
        (arg({"as_int": 1, "as_float": 1.0}), CheckpointError, "2 tags"),
        (arg({}), CheckpointError, "0 tags"),
        (arg(mapping(400)), UnsafeInputError, "nested too deeply"),
        (graph(lambda g: g.pop("tensor_values")), CheckpointError, "'tensor_values' is missing"),
        (graph(lambda g: g["tensor_values"].pop("x")), CheckpointError, "'x' is missing"),
        (
            graph(lambda g: g["tensor_values"]["x"].update(sizes=[{"as_int": -1}])),
            CheckpointError,
            "a size is -1",
        ),
        (signature(lambda s: s.pop("input_specs")), CheckpointError, "'input_specs' is missing"),
        (
            signature(lambda s: s["input_specs"].append(s["input_specs"][0])),
            CheckpointError,
            "p_conv_weight is defined twice",
        ),
        (signature(lambda s: s["input_specs"].pop(0)), CheckpointError, "reads 'p_conv_weight'"),
        (
            signature(lambda s: s["input_specs"].append({"token": {}})),
            UnsupportedModelError,
            "include a token",
        ),
        (
            signature(
                lambda s: s["input_specs"].append({"user_input": {"arg": {"as_sym_int": {}}}})
            ),
            UnsupportedModelError,
            "include sym_int; only tensors",
        ),
        (
            signature(lambda s: s["output_specs"].append({"loss_output": {}})),
            UnsupportedModelError,
            "include a loss_output",
        ),
        (
            signature(lambda s: s.update(output_specs=[])),
            UnsupportedModelError,
            "returns no tensor",
        ),
        (
            signature(lambda s: s.update(output_specs=[{"user_output": {"arg": tensor("zz")}}])),
            CheckpointError,
            "reads 'zz' before",
        ),
    ],
)
def test_damaged_and_unknown_descriptions(change, error, text):
    with pytest.raises(error, match=text) as caught:
        read_pt2(edited(small(), change), "net.pt2")
    assert str(caught.value).startswith("net.pt2")


def test_deeply_nested_graphs():
    call = '{"target":"torch.ops.higher_order.wrap","outputs":[],"inputs":[{"name":"","arg":'
    call += '{"as_graph":{"name":"g","graph":{"inputs":[],"outputs":[],"nodes":['
    tail = "]}}}}]}"
    for levels, error in ((20, None), (5000, UnsafeInputError)):
        text = call * levels + tail * levels
        data = edited(small(), graph(lambda g: g["nodes"].append("MARK")), ('"MARK"', text))
        if error is None:
            assert read_pt2(data, "net.pt2").calls
        else:
            with pytest.raises(error, match="nested too deeply"):
                read_pt2(data, "net.pt2")


JUNK = (
    *(None, True, -1, 0, 2**70, 0.5, "", "x", "conv2d", "Infinity", "as_int", [], [[]], {}, [{}]),
    *({"as_int": 1}, {"name": "x"}, {"as_name": "x"}, {"as_none": True}),
    *({"as_tensors": [{"name": "q"}]}, {"as_graph": {"name": "g", "graph": {}}}),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("seed", range(150))
def test_junk_anywhere_raises_only_typed_errors(seed):
    choose = random.Random(seed)

    def spoil(record: Any) -> None:
        here, key = choose.choice(list(places(record)))
        match choose.randrange(4):
            case 0:
                del here[key]
            case 1 if isinstance(here, dict):
                here[choose.choice(("as_int", "as_tensor", "as_none", "name"))] = here.pop(key)
            case 2 if isinstance(here, list):
                here.append(here[key])
            case _:
                here[key] = copy.deepcopy(choose.choice(JUNK))

    try:
        read_pt2(edited(small(), spoil), "net.pt2")
    except DfqError as error:
        text = str(error)
    else:
        text = "net.pt2"
    assert text.startswith("net.pt2")
