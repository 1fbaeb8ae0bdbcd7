"""Writes ONNX: the float network, and the quantized one in QDQ form.

Only operators of the default domain, batch size free; images are read as the source reads them, and
lie channels first inside, as `io/onnx/layout.py` settles. How integers get into the file is told in
`io/onnx/qdq.py`, which nodes an operator becomes in `io/onnx/nodes.py`.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import onnx

from dfq_jax.base.words import Store
from dfq_jax.errors import DfqError, ExportError
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Constant
from dfq_jax.io.artifacts.graph_json import inputs_to_json
from dfq_jax.io.frontends.contracts import CONTRACT, INPUTS
from dfq_jax.io.onnx.builder import OnnxBuilder, WrittenNode, printable, tensor
from dfq_jax.io.onnx.layout import Shape, as_filed, filed, in_layout, turned
from dfq_jax.io.onnx.nodes import add_operator
from dfq_jax.io.onnx.qdq import add_pairs, add_slots, without_idle_ceiling
from dfq_jax.io.onnx.values import Draft, draft, input_name, missing_axes, quantized_edges
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.basis import LearnedLevels
from dfq_jax.numerics.levels import Levels
from dfq_jax.numerics.signs import Signs
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import Input, InputContract, TokenColumns, Tokens, Values

OPSET, OPSET_NEW = 17, 21
IR_VERSION = {OPSET: 8, OPSET_NEW: 10}
SPARE = 2**24
"""Bytes left for everything that is no weight."""
LARGEST = 2**31 - 1
"""Bytes a protobuf file can have."""
LARGER = (64, 96)
"""Pixels added in height and width to see whether a file serves other sizes."""
SHORTER = -1
"""Tokens added to a row to see whether a file serves other lengths: a shorter one has places."""


def float_onnx(model: Model, *, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The float network as ONNX, batch norms included where they are not folded.

    Args:
      model: any network with one input.
      metadata: further properties to write into the file.

    Returns:
      A checked model: input `images` float32 [N, c, h, w], or [N, h, w, c] if the contract's
      layout says so, normalised, or `input_ids` int64 [N, length]; output `logits`, further ones
      under their own names; all are called as the source of the network calls them, if it says.
      Outputs of rank 4 have the layout of the input.

    Raises:
      ExportError: if ONNX cannot express the network.
    """
    return export(model, None, metadata or {})


def quantized_onnx(
    quantized: QuantizedModel, *, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The quantized network as ONNX in QDQ form.

    Args:
      quantized: a calibrated network; kernels are rounded to their grids here.
      metadata: further properties to write into the file.

    Returns:
      A checked model with the input and output of `float_onnx`, of opset 17; of opset 21 where
      the plan has kernels in groups or activations of 16 bits, or stores kernels of up to 4 bits as
      ONNX's own 4-bit integers.

    Raises:
      ExportError: if ONNX cannot express the network or its plan.
    """
    check_levels(quantized.plan)
    plan = quantized.plan
    facts = {"dfq.scheme": str(plan.scheme), "dfq.layers": plan.layers, **(metadata or {})}
    return export(quantized.model, quantized, facts)


def check_levels(plan: Plan) -> None:
    """Refuses levels that ONNX has no form of.

    Raises:
      ExportError: naming the first site that has some.
    """
    for site, spec in plan.entries:
        if site.argument is not None and isinstance(spec.levels, Signs):
            raise ExportError(
                f"{site.slot} of {site.node!r} lies on signs, which ONNX quantizes no activations "
                "to; give activations a grid of 2 bits or more."
            )
        if isinstance(spec.levels, LearnedLevels):
            raise ExportError(
                f"{site.slot} of {site.node!r} lies on learned levels, ONNX has uniform grids "
                "only; quantize with `squant` or `dfq` instead, or export `quantized.model` in "
                "float."
            )


def check_file_size(stored: int) -> None:
    """Refuses weights of so many bytes that no ONNX file can hold them.

    Raises:
      ExportError: if they exceed the 2 GiB of one protobuf file.
    """
    if stored + SPARE > LARGEST:
        raise ExportError(
            f"the network's weights take {stored / 2**30:.1f} GiB in float, an ONNX file holds at "
            "most 2 GiB: quantize a smaller variant, or the parts of the network one by one."
        )


def serialize(proto: onnx.ModelProto) -> bytes:
    """The bytes of an ONNX file, the same for the same model.

    Raises:
      ExportError: if they exceed the 2 GiB of one protobuf file.
    """
    check_file_size(sum(len(t.raw_data) for t in proto.graph.initializer))
    return proto.SerializeToString(deterministic=True)


def export(
    model: Model, quantized: QuantizedModel | None, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Writes the network node by node, quantized where `quantized` says so."""
    b, drafted = written(model, quantized)
    larger = shapes_of_larger(model, quantized, b)
    if larger is None and isinstance(model.input, InputContract):
        names = (model.input.names[0], "", "")
        fixed = dataclasses.replace(model.input, names=names)
        model = dataclasses.replace(model, inputs=(fixed,))
    return assemble(b, model, drafted, larger or drafted.shapes, metadata)


def written(model: Model, quantized: QuantizedModel | None) -> tuple[OnnxBuilder, Draft]:
    """All nodes of the file, and what was settled before."""
    graph, edges = model.graph, () if quantized is None else quantized_edges(quantized)
    drafted = draft(model, edges)
    fed = fed_names(model)
    reserved, free = {*fed, *drafted.names}, bool(getattr(model.input, "symbol", ""))
    b = OnnxBuilder(fed[0], reserved, opset_of(quantized), any_length=free)
    add_image(b, model, drafted)
    add_pairs(b, edges, drafted, graph.inputs[0], None)
    for node in graph.nodes:
        if isinstance(node.op, Constant):
            stored = np.asarray(model.params[node.name]["value"], np.float32)
            value = as_filed(stored, drafted.layouts.held[node.name])
            b.initializers.append(tensor(drafted.held[node.name], value))
        else:
            computed = without_idle_ceiling(graph, node, edges)
            add_operator(b, as_step(b, model, quantized, computed, drafted))
        add_pairs(b, edges, drafted, node.name, node)
    for output, value in drafted.outputs.items():
        add_copy(b, drafted, output, value, model.input.layout)
    for name, output in drafted.returned.items():
        if name != (value := drafted.outputs[output]):
            b.add("Identity", name, (value,), name)
    return b, drafted


def shapes_of_larger(
    model: Model, quantized: QuantizedModel | None, b: OnnxBuilder
) -> dict[str, Shape] | None:
    """The shapes of all tensors for another size of input, where sizes may stay free in the file.

    They may if the very same file is written for that; else the answer is None.
    """
    read = resized(model.input)
    if read is None:
        return None
    model = dataclasses.replace(model, inputs=(read,))
    if quantized is not None:
        quantized = dataclasses.replace(
            quantized, model=dataclasses.replace(quantized.model, inputs=(read,))
        )
    try:
        other, drafted = written(model, quantized)
    except DfqError:
        return None
    alike = other.nodes == b.nodes and other.initializers == b.initializers
    return drafted.shapes if alike else None


def resized(read: Input) -> Input | None:
    """An input of another size: images larger, rows shorter; None where no size is free."""
    match read:
        case InputContract():
            _, height, width = read.names
            if not (height or width):
                return None
            taller = read.height + (LARGER[0] if height else 0)
            wider = read.width + (LARGER[1] if width else 0)
            return dataclasses.replace(read, height=taller, width=wider)
        case Tokens() | TokenColumns() if read.symbol and read.length > 2:
            return read.of_length(read.length + SHORTER)
        case _:
            return None


def opset_of(quantized: QuantizedModel | None) -> int:
    """The opset of the file: the first with 4 and 16 bits and with groups, where there are any."""
    if quantized is None:
        return OPSET
    plan = quantized.plan
    new = any(is_new(spec.levels, site, plan.store) for site, spec in plan.entries)
    return OPSET_NEW if new else OPSET


def is_new(levels: Levels, site: Site, store: Store) -> bool:
    """Whether a site takes what older opsets have not got."""
    if not isinstance(levels, Grid):
        return False
    narrow = store == "int4" and levels.bits <= 4 and site.argument is None
    return narrow or levels.bits > 8 or levels.group is not None


def as_step(
    b: OnnxBuilder,
    model: Model,
    quantized: QuantizedModel | None,
    node: Node,
    drafted: Draft,
) -> WrittenNode:
    """A node with its arguments brought to the layout it reads, and its parameters added."""
    layouts, shapes = drafted.layouts, tuple(drafted.shapes[i] for i in node.inputs)
    layout, args = layouts.read[node.name], []
    for index, (source, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
        value = drafted.read[Site(node.name, index)]
        rank = len(shape)
        args.append(b.brought(value, rank, layouts.held[source], layout) if rank >= 4 else value)
    return WrittenNode(
        node,
        tuple(args),
        drafted.held[node.name],
        add_slots(b, model, quantized, node, len(shapes[0]), layout),
        shapes,
        drafted.shapes[node.name],
        layout,
        layouts.held[node.name],
        quantized is not None and Site(node.name) in quantized.plan.table,
    )


def add_image(b: OnnxBuilder, model: Model, drafted: Draft) -> None:
    """Gives lines a height, and turns images channels first where the file has channels last."""
    source, read = model.graph.inputs[0], input_name(model)
    held, rank = drafted.held[source], len(drafted.shapes[source])
    have, want = filed(rank, model.input.layout), drafted.layouts.held[source]
    if missing := missing_axes(model.input):
        whole = held if have == want else b.fresh(f"{read}.image")
        axes = b.integers(f"{read}.axes", missing)
        read = b.add("Unsqueeze", whole, (read, axes), whole)
    if have != want:
        perm = turned(tuple(range(rank)), have, want)
        b.add("Transpose", held, (read,), held, perm=perm)


def add_copy(b: OnnxBuilder, drafted: Draft, output: str, value: str, layout: str) -> None:
    """Gives an output of the network its name and layout where it has not got them."""
    held, rank = drafted.held[output], len(drafted.shapes[output])
    have, want = drafted.layouts.held[output], filed(rank, layout)
    if have != want:
        perm = turned(tuple(range(rank)), have, want)
        b.add("Transpose", value, (held,), value, perm=perm)
    elif held != value:
        b.add("Identity", value, (held,), value)


def assemble(
    b: OnnxBuilder,
    model: Model,
    drafted: Draft,
    larger: Mapping[str, Shape],
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """The finished file; sizes are free where they differ for larger images.

    Raises:
      ExportError: if the ONNX checker finds fault with it.
    """
    info = lambda name, t: value_info(name, drafted.shapes[t], larger[t], model)
    read = [info(name, model.graph.inputs[0]) for name in fed_names(model)]
    outputs = [info(name, t) for name, t in drafted.returned.items()]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(b.nodes, "dfq_jax", read, outputs, b.initializers),
        opset_imports=[onnx.helper.make_opsetid("", b.opset)],
        ir_version=IR_VERSION[b.opset],
        producer_name="dfq_jax",
    )
    facts = {**stated(model.input), **metadata}
    onnx.helper.set_model_props(proto, facts)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the exported network: {error}") from error
    return proto


def value_info(name: str, shape: Shape, larger: Shape, model: Model) -> onnx.ValueInfoProto:
    """A tensor in the file's layout, with a free batch size if it has several rows.

    Ids are int64, all else float32.

    Args:
      name: of the tensor.
      shape: of it, as stored.
      larger: for larger images; a size that differs gets a name.
      model: the network.
    """
    read = model.input
    layout, batch, known = filed(len(shape), read.layout), "N", {}
    ids = not isinstance(read, InputContract | Values) and name in fed_names(model)
    if isinstance(read, InputContract):
        batch, *names = read.names
        sizes = zip((read.height, read.width), LARGER, strict=True)
        known = dict(zip(sizes, names, strict=True))
    elif not isinstance(read, Values):
        known = {(read.length, SHORTER): read.symbol}
    if ids:
        shape, larger = shape[:2], larger[:2]
    missing = missing_axes(read) if name == input_name(model) else ()
    sides = zip(in_layout(shape, layout), in_layout(larger, layout), strict=True)
    rows, *sizes = (side for axis, side in enumerate(sides) if axis not in missing)
    dims = [
        a if a == b else known.get((a, b - a)) or f"{name}_{axis}"
        for axis, (a, b) in enumerate(sizes, 1)
    ]
    kind = onnx.TensorProto.INT64 if ids else onnx.TensorProto.FLOAT
    return onnx.helper.make_tensor_value_info(name, kind, [1 if rows[0] == 1 else batch, *dims])


def fed_names(model: Model) -> tuple[str, ...]:
    """What files call their inputs."""
    if isinstance(model.input, TokenColumns):
        return tuple(map(printable, model.input.names))
    return (input_name(model),)


def stated(read: Input) -> dict[str, str]:
    """{property of the file: what it reads}: a contract of images, any other input by its kind."""
    if isinstance(read, InputContract):
        return {CONTRACT: json.dumps(described(read))}
    return {INPUTS: json.dumps(inputs_to_json((read,)))}


def described(contract: InputContract) -> dict:
    """The input contract as plain data, with what its numbers mean in words."""
    return {
        "layout": contract.layout,
        "channels": "RGB" if contract.channels == 3 else f"{contract.channels} as trained",
        "formula": "(pixel / 255 - mean) / std, per channel",
        "range": "pixels 0..255 before the formula",
        "height": contract.height,
        "width": contract.width,
        "mean": list(contract.mean),
        "std": list(contract.std),
        "resize": contract.resize,
        "crop": None if contract.resize is None else "centre",
        "interpolation": contract.interpolation,
        "assumed": contract.assumed,
        "names": list(contract.names),
    }
