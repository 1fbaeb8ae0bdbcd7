"""Small damages to a quantized ONNX file, each of which changes what the file says."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx

Mutate = Callable[[onnx.ModelProto, Any], str | None]
"""Damages a file in place and says how, in words; None where there is nothing to damage."""


class Mutated(NamedTuple):
    """A damaged file: what kind of damage, where, and its bytes."""

    kind: str
    where: str
    file: bytes


def mutations(file: bytes, count: int, seed: int = 0) -> Iterator[Mutated]:
    """So many damages of all kinds in turn, at random places.

    Args:
      file: a quantized network as the exporter writes it.
      count: how many.
      seed: of places.
    """
    random, made, turn = np.random.default_rng(seed), 0, 0
    kinds = list(KINDS.items())
    while made < count and turn < 20 * count:
        name, mutate = kinds[turn % len(kinds)]
        turn += 1
        proto = onnx.load_model_from_string(file)
        where = mutate(proto, random)
        if where is not None and (data := proto.SerializeToString()) != file:
            made += 1
            yield Mutated(name, where, data)


def chosen(proto: onnx.ModelProto, random: Any, suffix: str) -> onnx.TensorProto | None:
    """A random initializer whose name ends so."""
    found = [t for t in proto.graph.initializer if t.name.endswith(suffix) and t.raw_data]
    return found[random.integers(len(found))] if found else None


def flip(suffix: str) -> Mutate:
    """Flips one bit of a constant whose name ends so."""

    def mutate(proto: onnx.ModelProto, random: Any) -> str | None:
        tensor = chosen(proto, random, suffix)
        if tensor is None:
            return None
        data, at = bytearray(tensor.raw_data), int(random.integers(len(tensor.raw_data)))
        bit = int(random.integers(8))
        data[at] ^= 1 << bit
        tensor.raw_data = bytes(data)
        return f"bit {bit} of byte {at} of {tensor.name}"

    return mutate


def scaled(factor: float) -> Mutate:
    """Multiplies a scale."""

    def mutate(proto: onnx.ModelProto, random: Any) -> str | None:
        tensor = chosen(proto, random, ".scale")
        if tensor is None:
            return None
        values = np.frombuffer(tensor.raw_data, "<f4") * np.float32(factor)
        tensor.raw_data = values.astype("<f4").tobytes()
        return f"{tensor.name} times {factor}"

    return mutate


def shifted(step: int) -> Mutate:
    """Adds to a zero point of one byte."""

    def mutate(proto: onnx.ModelProto, random: Any) -> str | None:
        tensor = chosen(proto, random, ".zero_point")
        if tensor is None or tensor.data_type not in (onnx.TensorProto.UINT8,):
            return None
        values = np.frombuffer(tensor.raw_data, np.uint8) + np.uint8(step % 256)
        tensor.raw_data = values.astype(np.uint8).tobytes()
        return f"{tensor.name} plus {step}"

    return mutate


def swapped_values(proto: onnx.ModelProto, random: Any) -> str | None:
    """Exchanges the content of two constants of one type and shape."""
    tensors = list(proto.graph.initializer)
    first = tensors[random.integers(len(tensors))]
    alike = lambda t: t.data_type == first.data_type and list(t.dims) == list(first.dims)
    others = [t for t in tensors if alike(t) and t.raw_data != first.raw_data]
    if not others:
        return None
    other = others[random.integers(len(others))]
    first.raw_data, other.raw_data = other.raw_data, first.raw_data
    return f"{first.name} and {other.name}"


def permuted(proto: onnx.ModelProto, random: Any) -> str | None:
    """Turns the values of a kernel around."""
    tensor = chosen(proto, random, ".kernel.codes")
    if tensor is None:
        return None
    tensor.raw_data = tensor.raw_data[::-1]
    return f"{tensor.name} backwards"


def other_attribute(proto: onnx.ModelProto, random: Any) -> str | None:
    """Changes a whole number among the attributes of a node."""
    found = [(n, a) for n in proto.graph.node for a in n.attribute if a.ints or a.type == a.INT]
    if not found:
        return None
    node, attribute = found[random.integers(len(found))]
    if attribute.ints:
        attribute.ints[-1] += 1
    else:
        attribute.i += 1
    return f"{attribute.name} of {node.name}"


def other_input(proto: onnx.ModelProto, random: Any) -> str | None:
    """Lets a node read the scale of another quantizer."""
    nodes = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scalar = {t.name for t in proto.graph.initializer if not t.dims}
    found = [n for n in nodes if n.input[1] in scalar]
    if len(found) < 2:
        return None
    a, b = (found[i] for i in random.choice(len(found), 2, replace=False))
    if a.input[1] == b.input[1]:
        return None
    a.input[1] = b.input[1]
    return f"{a.name} reads {b.input[1]}"


def other_operator(proto: onnx.ModelProto, random: Any) -> str | None:
    """Exchanges a rectifier for another curve."""
    found = [n for n in proto.graph.node if n.op_type in ("Relu", "Add", "MaxPool")]
    if not found:
        return None
    node = found[random.integers(len(found))]
    node.op_type = {"Relu": "Abs", "Add": "Sub", "MaxPool": "AveragePool"}[node.op_type]
    if node.op_type == "AveragePool":
        kept = [a for a in node.attribute if a.name != "dilations"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return f"{node.name} is {node.op_type}"


KINDS: dict[str, Mutate] = {
    "bit of a kernel": flip(".kernel.codes"),
    "bit of a bias": flip(".bias.codes"),
    "bit of a scale": flip(".scale"),
    "scale + 2 %": scaled(1.02),
    "scale - 2 %": scaled(0.98),
    "zero point + 1": shifted(1),
    "zero point - 1": shifted(-1),
    "constants exchanged": swapped_values,
    "kernel backwards": permuted,
    "attribute": other_attribute,
    "input": other_input,
    "operator": other_operator,
}
