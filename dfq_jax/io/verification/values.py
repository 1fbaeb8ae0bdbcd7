"""The values of a file that are compared."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from dfq_jax.errors import DataError
from dfq_jax.io.onnx.layout import as_stored, filed
from dfq_jax.io.onnx.values import Draft, QuantizedEdge


def code_values(
    proto: onnx.ModelProto, edges: tuple[QuantizedEdge, ...], drafted: Draft
) -> dict[str, int]:
    """{value in the file that holds the codes of edges: its element type}.

    Raises:
      DataError: if the file quantizes or returns other tensors than the network.
    """
    returned, outputs = [o.name for o in proto.graph.output], list(drafted.returned)
    if returned != outputs:
        raise DataError(
            f"the ONNX file returns {returned}, the network {outputs}. Export the network again."
        )
    wanted = {drafted.pairs[edge.key].codes: edge for edge in edges}
    nodes = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    computed = {value for n in proto.graph.node for value in n.output}
    missing = [edge.tensor for codes, edge in wanted.items() if codes not in computed]
    if missing or len(nodes) != len(wanted):
        raise DataError(
            f"the ONNX file quantizes {len(nodes)} tensors, the network {len(wanted)}; "
            f"not in the file: {missing[:5]}. Export the network again."
        )
    kind = onnx.helper.np_dtype_to_tensor_dtype
    return {codes: kind(edge.grid.dtype) for codes, edge in wanted.items()}


def edge_codes(found: Mapping[str, np.ndarray], edge: QuantizedEdge, drafted: Draft) -> np.ndarray:
    """The codes of an edge in the library's layout, out of {value: codes} of the file."""
    codes = found[drafted.pairs[edge.key].codes]
    return as_stored(codes, drafted.layouts.held[edge.tensor])


def exposed(proto: onnx.ModelProto, kinds: Mapping[str, int]) -> onnx.ModelProto:
    """The network with integer tensors, of these element types, as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    told = onnx.helper.make_tensor_value_info
    copy.graph.output.extend(told(value, kind, None) for value, kind in kinds.items())
    return copy


def in_nhwc(values: Sequence[np.ndarray], layout: str) -> list[np.ndarray]:
    """Outputs of a file, which has images in `layout`, in the library's layout."""
    return [as_stored(v, filed(v.ndim, layout)) for v in values]
