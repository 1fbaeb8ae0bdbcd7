"""A traced network as a frontend read it, before it becomes a `Graph`.

`.pt2`, ONNX, live modules and functions of JAX all become a `Program`: calls in order, in the
source's own operators and axis order, with every weight as an array. `io/importing` turns it into a
`Graph`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Ref(NamedTuple):
    """A use of a tensor (or of a traced number) by its name."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramInput:
    """What the network is fed.

    Attributes:
      name: of the tensor.
      shape: in the source's axis order; None where the size is free and has no hint.
      names: of the axes whose size is free, empty text elsewhere; none if no axis has one.
      whole: whether it holds whole numbers or truths, as ids and masks are.
    """

    name: str
    shape: tuple[int | None, ...]
    names: tuple[str, ...] = ()
    whole: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One operation.

    Attributes:
      target: the source's operator, e.g. `aten.conv2d.default` or `onnx.Conv`.
      args: positional arguments (ONNX inputs; None where left out). A `Ref` reads a tensor;
        everything else is a literal: numbers, strings, arrays, None, and tuples of these.
      kwargs: arguments by name (all of them in `.pt2`, attributes in ONNX). The first tensor of
        an ATen operator, `self` or `input` there, is called `x`.
      outputs: names it defines; None for one nobody reads.
      path: where the network's author would look: module path, or ONNX node name; may be empty.
      label: what the source itself calls it, for messages; may be empty.
      line: of the author's code that it comes from, for messages; may be empty.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str | None, ...]
    path: str
    label: str = ""
    line: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A network in the operators of its source.

    Attributes:
      inputs: what it is fed, without weights.
      arrays: {tensor: read-only array}: parameters, buffers and constants.
      paths: {tensor: parameter path} of those arrays that have one, e.g. `layer1.0.conv1.weight`.
      calls: in execution order; every `Ref` names an input, an array, or an earlier output.
      outputs: names of the results.
      notes: what the user should know, one line each.
      facts: what the file says about itself beside its graph.
      usual_layout: of images where nothing in the network tells; empty to go by their sizes.
      producer: the program that wrote it; empty where nothing says.
    """

    inputs: tuple[ProgramInput, ...]
    arrays: Mapping[str, np.ndarray]
    paths: Mapping[str, str]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    usual_layout: str = ""
    producer: str = ""
