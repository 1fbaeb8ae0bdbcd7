"""What is quantized, and how: a frozen table resolved once from a scheme, a preset and rules.

A *site* is an edge `(node, "input0")` or a parameter slot `(node, "kernel")`.

- Kernels of convolutions, transposed convolutions and linear layers are sites, with one scale per
  output channel; those of grouped transposed convolutions have one scale, as ONNX demands.
- Edges are sites, `MatMul`'s both, except
  - into ReLU, clip and batch norm, which the operator before them absorbs;
  - into operators without a good 8-bit form, which compute in float: layer and group norm,
    softmax, powers, and the curves of `sites.FLOAT_CURVES`;
  - into a sum that a layer norm reads: the residual stream of a transformer stays in float;
  - into an operator that only moves values to such float readers;
  - into an operator that values leave for an output of the network, merely moved, joined or
    clipped (`sites.ways_out`): boxes and scores that one output joins would need grids apart.
- Edges that carry the values of one tensor share one grid, so a deployed file quantizes each
  tensor once. Pooling by maximum, slicing, padding, reshaping, … (`query.keeps_values`) make no new
  values: edges behind them belong to the tensor before them.
- A constant that a site reads has the range of its own values.
- Presets that end in `shortcuts` give what layers read and what other operators read of the same
  tensor a grid each, the latter of 8 bits, so a residual stream keeps its precision.
- The first weighted layer and the last before each output are the ends that presets keep at
  8 bits. Edges of `MatMul` have the bits of activations, edges into other operators 8.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import get_args

from dfq_jax.errors import PlanError, check_choice
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import WEIGHTED, ConvTranspose2d, Weighted
from dfq_jax.graph.query import last_weighted, weighted_nodes
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import Observer
from dfq_jax.quantize.observers import (
    DEFAULT_OBSERVER,
    DEFAULT_OBSERVERS,
    Observers,
    check_observers,
)
from dfq_jax.quantize.sites import Site, leading_to, products, tensor_groups
from dfq_jax.words import LayerPreset, Store

LAYER_PRESETS: tuple[LayerPreset, ...] = get_args(LayerPreset)
STORES: tuple[Store, ...] = get_args(Store)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one site is quantized: its grid and how the grid's range is found."""

    grid: Grid
    observer: Observer = DEFAULT_OBSERVER


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations, as written `w4a8`."""

    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        """`w{bits}a{bits}`."""
        return f"w{self.weight_bits}a{self.activation_bits}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Bits for the layers whose name matches a glob; the last matching rule wins.

    Attributes:
      pattern: shell-style glob over node names, e.g. `layer1.*`.
      weight_bits: bits of the kernel, None to leave as resolved.
      input_bits: bits of the layer's input tensor, None to leave as resolved; if others read that
        tensor with more, it has those.
      keep_float: leave the layer in float; its input stays on the grid that others read it on.
    """

    pattern: str
    weight_bits: int | None = None
    input_bits: int | None = None
    keep_float: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resolved table.

    Attributes:
      entries: every quantized site with its spec, in execution order.
      groups: (tensor, sites sharing its grid); a tensor on two grids is there twice.
      scheme: as asked for.
      layers: name of the layer preset.
      store: how kernels lie in the file.
    """

    entries: tuple[tuple[Site, Spec], ...]
    groups: tuple[tuple[str, tuple[Site, ...]], ...]
    scheme: Scheme
    layers: LayerPreset
    store: Store = "packed"

    def spec(self, site: Site) -> Spec | None:
        """The spec of a site, None where it stays float."""
        return self.table.get(site)

    @cached_property
    def table(self) -> Mapping[Site, Spec]:
        """`entries` as a mapping."""
        return dict(self.entries)


def parse_scheme(text: str) -> Scheme:
    """Reads `w{2..8}a{2..8}`.

    Raises:
      PlanError: on anything else.
    """
    match = re.fullmatch(r"w([2-8])a([2-8])", text.strip().lower())
    if match is None:
        raise PlanError(f"scheme {text!r} is not w{{2..8}}a{{2..8}}; w8a8 and w4a8 are common.")
    return Scheme(int(match[1]), int(match[2]))


def weight_spec(op: Weighted, bits: int, observer: Observer) -> Spec:
    """Per-output-channel weights: symmetric int8 at 8 bits and 7, with a zero point below.

    Pairs of products of kernels below 8 bits with bytes then fit in 16 bits, to which processors
    with AVX2 and without VNNI saturate them: 2 * 255 * 63 < 2**15.

    ONNX scales a transposed convolution along output channels *of a group*: with several groups,
    one scale must do.
    """
    one_scale = isinstance(op, ConvTranspose2d) and op.groups > 1
    return Spec(Grid(bits, symmetric=bits >= 7, axis=None if one_scale else -1), observer)


def resolve(
    graph: Graph,
    scheme: Scheme,
    layers: LayerPreset = "qdrop_8bit_ends",
    rules: Iterable[Rule] = (),
    observers: Observers = DEFAULT_OBSERVERS,
) -> Plan:
    """The plan for a network without batch norms left to fold.

    Args:
      graph: the folded network.
      scheme: bits of weights and activations.
      layers: which layers stay at 8 bits. `zsq_all_low`: none, only tensors after a ReLU are
        quantized; `qdrop_8bit_ends`: first and last kernels and the last layer's input at 8 bits;
        `brecq_8bit_ends_second`: also the input of the second layer; `..._shortcuts`: also what
        operators without kernels read of a tensor that layers read with fewer bits.
      rules: exceptions by name.
      observers: how ranges of weights and of activations are found.

    Returns:
      The resolved plan.

    Raises:
      PlanError: if a rule matches no layer or is none, a preset is unknown, an observer does not
        suit weights, or nothing is left to quantize.
    """
    check_observers(observers)
    check_choice("layer preset", layers, LAYER_PRESETS, PlanError)
    preset = layer_bits(graph, scheme, layers)
    ruled = dict(preset)
    for rule in rules:
        apply_rule(ruled, preset, rule)
    bits = {name: ruled[name] for name in preset if name in ruled}
    if not bits:
        raise PlanError("no layer is left to quantize: the rules keep all of them in float.")
    kernels = [
        (Site(n.name, "kernel"), weight_spec(n.op, bits[n.name][0], observers.weights))
        for n in graph.nodes
        if isinstance(n.op, WEIGHTED) and n.name in bits
    ]
    groups = tensor_groups(graph, only_rectified=layers == "zsq_all_low")
    parted = with_shortcuts(graph, groups, preset) if "shortcuts" in layers else groups.items()
    edges, kept = [], []
    for tensor, sites in parted:
        wanted = [bits[s.node][1] for s in sites if s.node in bits]
        kept_float = any(s.node in preset for s in sites)  # once nobody wanted bits for it
        if not wanted and (kept_float or layers == "zsq_all_low"):
            continue
        spec = Spec(Grid(max(wanted, default=8)), observers.activations)
        edges += [(site, spec) for site in sites]
        kept.append((tensor, tuple(sites)))
    return Plan(tuple(kernels + edges), tuple(kept), scheme, layers)


def with_shortcuts(
    graph: Graph, groups: Mapping[str, list[Site]], layers: Collection[str]
) -> Iterator[tuple[str, list[Site]]]:
    """The groups, those edges apart that lead to layers alone."""
    serving = set(layers) | set(leading_to(graph, layers))
    for tensor, sites in groups.items():
        read = [s for s in sites if s.node in serving]
        others = [s for s in sites if s.node not in serving]
        yield from ((tensor, part) for part in (read, others) if part)


def observing(plan: Plan, observer: Observer) -> Plan:
    """The plan with another way to find the ranges of its 8-bit edges."""
    edge = lambda site, spec: site.argument is not None and spec.grid.bits == 8
    entries = tuple(
        (site, dataclasses.replace(spec, observer=observer) if edge(site, spec) else spec)
        for site, spec in plan.entries
    )
    return dataclasses.replace(plan, entries=entries)


def stored_as(plan: Plan, store: str) -> Plan:
    """The plan with its kernels in another form in the file; their numbers are the same.

    Raises:
      PlanError: if there is no such form.
    """
    check_choice("form of kernels", store, STORES, PlanError)
    return dataclasses.replace(plan, store=next(s for s in STORES if s == store))


def layer_bits(graph: Graph, scheme: Scheme, layers: LayerPreset) -> dict[str, tuple[int, int]]:
    """{layer: (weight bits, input bits)} of a preset; a product of two tensors has inputs only."""
    w, a = scheme.weight_bits, scheme.activation_bits
    bits = {n.name: (w, a) for n in products(graph)}
    nodes = weighted_nodes(graph)
    if layers != "zsq_all_low" and nodes:
        second = layers.startswith("brecq_8bit_ends_second")
        ends = (nodes[0].name, nodes[-1].name, *last_weighted(graph))
        bits |= dict.fromkeys(ends, (8, 8))
        if second and len(nodes) > 2 and nodes[1].name not in ends:
            bits[nodes[1].name] = (w, 8)
    return bits


def apply_rule(
    bits: dict[str, tuple[int, int]], preset: dict[str, tuple[int, int]], rule: Rule
) -> None:
    """Applies one rule to the table of bits, in place.

    Args:
      bits: of every layer that is quantized, as ruled so far.
      preset: of all layers; a layer that an earlier rule kept in float comes back with these.
      rule: the rule.

    Raises:
      PlanError: if its pattern matches no layer, or it asks for nothing or bits there are none of.
    """
    check_rule(rule)
    matched = fnmatch.filter(preset, rule.pattern)
    if not matched:
        near = difflib.get_close_matches(rule.pattern, preset, n=3, cutoff=0.0)
        raise PlanError(f"rule {rule.pattern!r} matches no layer; nearest: {', '.join(near)}.")
    for name in matched:
        if rule.keep_float:
            bits.pop(name, None)
        else:
            w, a = bits.get(name, preset[name])
            bits[name] = (rule.weight_bits or w, rule.input_bits or a)


def check_rule(rule: Rule) -> None:
    """Refuses a rule that asks for nothing, or for other than 2 to 8 bits.

    Raises:
      PlanError: naming it.
    """
    asked = {"weight_bits": rule.weight_bits, "input_bits": rule.input_bits}
    for name, bits in asked.items():
        if bits is not None and not 2 <= bits <= 8:
            raise PlanError(f"rule {rule.pattern!r} has {name} {bits}; a grid has 2 to 8 bits.")
    if not rule.keep_float and not any(asked.values()):
        raise PlanError(
            f"rule {rule.pattern!r} asks for nothing: give weight_bits, input_bits or keep_float."
        )


def float_layers(graph: Graph, plan: Plan) -> dict[str, str]:
    """{layer or product: why it does not multiply integers}, in execution order."""
    table, reasons = plan.table, {}
    for node in products(graph):
        slots = [f"input{i}" for i in range(len(node.inputs))]
        read = all(Site(node.name, slot) in table for slot in slots)
        stored = not isinstance(node.op, WEIGHTED) or Site(node.name, "kernel") in table
        if read and stored:
            continue
        if plan.layers == "zsq_all_low" and (stored or not isinstance(node.op, WEIGHTED)):
            reasons[node.name] = "zsq_all_low: its input is not behind a ReLU"
        else:
            reasons[node.name] = "a rule keeps it in float"
    return reasons
