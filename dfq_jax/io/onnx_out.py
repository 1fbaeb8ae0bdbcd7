"""Writes ONNX: the float network, and the quantized one in QDQ form.

Only operators of the default domain, NCHW, batch size free. How integers get into the file is
told in `io/onnx_qdq.py`, which nodes an operator becomes in `io/onnx_nodes.py`.
"""

import json
from collections.abc import Mapping

import onnx

from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Flatten, Linear
from dfq_jax.graph.query import consumers, output_shapes
from dfq_jax.io.onnx_builder import FOUR_BITS, OnnxBuilder, first_free, printable
from dfq_jax.io.onnx_nodes import NCHW, Order, add_operator
from dfq_jax.io.onnx_qdq import add_pairs, add_slots, quantized_edges, without_idle_ceiling
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.simulate import QuantizedModel
from dfq_jax.types import InputContract

INPUT, OUTPUT = "images", "logits"
OPSET, OPSET_INT4 = 17, 21
IR_VERSION = {OPSET: 8, OPSET_INT4: 10}
LARGEST = 2**31 - 1
"""Bytes a protobuf file can have."""

Shape = tuple[int, ...]


def float_onnx(model: Model, *, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The float network as ONNX, batch norms included where they are not folded.

    Args:
      model: any network with one input.
      metadata: further properties to write into the file.

    Returns:
      A checked model: input `images` float32 [N, c, h, w], normalised; output `logits`.

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
      A checked model with the input and output of `float_onnx`; opset 21 with 4-bit initialisers
      if a kernel has 4 bits or fewer, else opset 17.

    Raises:
      ExportError: if ONNX cannot express the network or its plan.
    """
    plan = quantized.plan
    facts = {"dfq.scheme": str(plan.scheme), "dfq.layers": plan.layers, **(metadata or {})}
    return export(quantized.model, quantized, facts)


def serialize(proto: onnx.ModelProto) -> bytes:
    """The bytes of an ONNX file, the same for the same model.

    Raises:
      ExportError: if they exceed the 2 GiB of one protobuf file.
    """
    if proto.ByteSize() > LARGEST:
        raise ExportError(
            f"network needs {proto.ByteSize() / 2**30:.1f} GiB, ONNX files hold at most 2 GiB."
        )
    return proto.SerializeToString(deterministic=True)


def export(
    model: Model, quantized: QuantizedModel | None, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Writes the network node by node, quantized where `quantized` says so."""
    graph = model.graph
    names, shapes, orders = value_names(graph), output_shapes(model), flat_orders(model)
    b = OnnxBuilder(names.values())
    edges = () if quantized is None else quantized_edges(quantized)
    read: dict[Site, str] = add_pairs(b, edges, graph.inputs[0], names[graph.inputs[0]], None)
    for node in graph.nodes:
        sites = [Site(node.name, f"input{i}") for i in range(len(node.inputs))]
        args = tuple(read.get(s, names[i]) for s, i in zip(sites, node.inputs, strict=True))
        rank = len(shapes[node.inputs[0]])
        order = orders.get(node.inputs[0]) if isinstance(node.op, Linear) else None
        slots = add_slots(b, model, quantized, node, rank, order)
        keeps_nhwc = rank == 4 and node.name not in orders
        computed = without_idle_ceiling(graph, node, edges)
        add_operator(b, computed, args, names[node.name], slots, rank, keeps_nhwc)
        read |= add_pairs(b, edges, node.name, names[node.name], node)
    return assemble(b, model, names, shapes, metadata)


def value_names(graph: Graph) -> dict[str, str]:
    """{tensor: name of its ONNX value}: `images`, `logits`, and the graph's own names between.

    Characters that could disturb a terminal are escaped; names that meet are numbered.

    Raises:
      ExportError: unless there is one input, and every output is the result of a node.
    """
    if len(graph.inputs) != 1:
        raise ExportError(f"ONNX export writes networks with one input, got {graph.inputs}.")
    if unchanged := set(graph.outputs) & set(graph.inputs):
        raise ExportError(f"network returns its own input {unchanged}; ONNX export cannot.")
    names = {graph.inputs[0]: INPUT, graph.outputs[0]: OUTPUT}
    taken = {INPUT, OUTPUT}
    for node in graph.nodes:
        if node.name not in names:
            names[node.name] = first_free(printable(node.name), taken)
            taken.add(names[node.name])
    return names


def flat_orders(model: Model) -> dict[str, Order]:
    """{flatten node: (h, w, c) it reads} where ONNX may flatten channels first.

    That is so when only linear layers read it: their kernels' rows are permuted instead.
    """
    graph, shapes, orders = model.graph, output_shapes(model), {}
    readers = consumers(graph)
    for node in graph.nodes:
        if not isinstance(node.op, Flatten) or node.name in graph.outputs:
            continue
        shape = shapes[node.inputs[0]]
        if len(shape) == 4 and all(isinstance(r.op, Linear) for r, _ in readers[node.name]):
            orders[node.name] = (shape[1], shape[2], shape[3])
    return orders


def assemble(
    b: OnnxBuilder,
    model: Model,
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """The finished file.

    Raises:
      ExportError: if the ONNX checker finds fault with it.
    """
    graph = model.graph
    opset = OPSET_INT4 if any(t.data_type in FOUR_BITS for t in b.initializers) else OPSET
    returned = dict.fromkeys(graph.outputs)
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            b.nodes,
            "dfq_jax",
            [value_info(INPUT, shapes[graph.inputs[0]])],
            [value_info(names[o], shapes[o]) for o in returned],
            b.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=IR_VERSION[opset],
        producer_name="dfq_jax",
    )
    facts = {"dfq.contract": json.dumps(described(model.contract)), **metadata}
    onnx.helper.set_model_props(proto, facts)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the exported network: {error}") from error
    return proto


def value_info(name: str, shape: Shape) -> onnx.ValueInfoProto:
    """A float32 tensor in NCHW with a free batch size."""
    sizes = [shape[a] for a in NCHW] if len(shape) == 4 else list(shape)
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *sizes[1:]])


def described(contract: InputContract) -> dict:
    """The input contract as plain data, with what its numbers mean in words."""
    return {
        "layout": "NCHW",
        "channels": "RGB" if contract.channels == 3 else f"{contract.channels} as trained",
        "formula": "(pixel / 255 - mean) / std, per channel",
        "range": "pixels 0..255 before the formula",
        "height": contract.height,
        "width": contract.width,
        "mean": list(contract.mean),
        "std": list(contract.std),
        "resize": contract.resize,
        "interpolation": contract.interpolation,
        "assumed": contract.assumed,
    }
