"""What is quantized, and how: a frozen table resolved once from a scheme, a preset and rules.

A *site* is what a node reads, `Site(node, 0)`, or its kernel, `Site(node)`.

- Kernels of convolutions, transposed convolutions and linear layers are sites, with one scale per
  output channel, for the whole kernel, or for groups of input channels of each output channel;
  those of grouped transposed convolutions have one scale, as ONNX demands.
- Where activations have no bits (`w8`, `w4g64`), edges are no sites: layers compute in float with
  kernels that are stored in few bits. So do those with kernels in groups or inputs of 16 bits.
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
from typing import Literal, NamedTuple, get_args

from dfq_jax.base.words import DEFAULT_STORE, LayerPreset, Store
from dfq_jax.errors import PlanError, check_choice
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import WEIGHTED, ConvTranspose2d, Weighted
from dfq_jax.graph.query import last_weighted, weighted_nodes
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.levels import Levels, multiplied_as_integers
from dfq_jax.numerics.ranges import Observer
from dfq_jax.numerics.signs import Signs
from dfq_jax.quantization.observers import (
    DEFAULT_OBSERVER,
    DEFAULT_OBSERVERS,
    Observers,
    check_observers,
)
from dfq_jax.quantization.sites import READING, Site, leading_to, operands, products, tensor_groups

LAYER_PRESETS: tuple[LayerPreset, ...] = get_args(LayerPreset)
STORES: tuple[Store, ...] = get_args(Store)
Sharing = Literal["channel", "tensor"] | int
"""Which weights share a scale: an output channel's, all, or groups of so many of its inputs."""
WIDE = 16
FLOAT_BITS = 32
"""Bits of activations on a fine grid, which no integer kernel multiplies."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one site is quantized: its levels and how their range is found."""

    levels: Levels
    observer: Observer = DEFAULT_OBSERVER

    @property
    def grid(self) -> Grid:
        """The levels of a site that is known to be on a uniform grid.

        Raises:
          PlanError: for other levels, which have no scale and zero point.
        """
        if not isinstance(self.levels, Grid):
            raise PlanError(
                f"a site on {self.levels} has no uniform grid, which this method needs; quantize "
                "it to 2 to 8 bits instead."
            )
        return self.levels


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations, as written `w4a8`, `w4g64` or `w8ta8`.

    Attributes:
      weight_bits: of kernels; 32 in `FLOAT`.
      activation_bits: of edges; None where only weights are quantized.
      sharing: which weights share a scale; kernels that a preset keeps at 8 bits have one for each
        output channel where others are in groups.
    """

    weight_bits: int
    activation_bits: int | None
    sharing: Sharing = "channel"

    def __str__(self) -> str:
        """As `parse_scheme` reads it; `float` if nothing is quantized."""
        if self.weight_bits == FLOAT_BITS:
            return "float"
        return f"w{self.weight_bits}{shared(self.sharing)}{of_edges(self.activation_bits)}"

    @property
    def fewest_bits(self) -> int:
        """Of whichever has fewer."""
        return min(self.weight_bits, self.activation_bits or WIDE)


def shared(sharing: Sharing) -> str:
    """A sharing as schemes and rules write it behind the bits of weights."""
    return f"g{sharing}" if isinstance(sharing, int) else {"channel": "", "tensor": "t"}[sharing]


def of_edges(bits: int | None) -> str:
    """Bits of activations as schemes and rules write them."""
    return "" if bits is None else f"a{bits}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Bits for the layers whose name matches a glob; the last matching rule wins.

    Attributes:
      pattern: shell-style glob over node names, e.g. `layer1.*`.
      weight_bits: bits of the kernel, None to leave as resolved.
      input_bits: bits of the layer's input tensor, None to leave as resolved; if others read that
        tensor with more, it has those.
      keep_float: leave the layer in float; its input stays on the grid that others read it on.
      sharing: which weights share a scale, None to leave as resolved.
    """

    pattern: str
    weight_bits: int | None = None
    input_bits: int | None = None
    keep_float: bool = False
    sharing: Sharing | None = None


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
    store: Store = DEFAULT_STORE

    def spec(self, site: Site) -> Spec | None:
        """The spec of a site, None where it stays float."""
        return self.table.get(site)

    @cached_property
    def table(self) -> Mapping[Site, Spec]:
        """`entries` as a mapping."""
        return dict(self.entries)

    def multiplies(self, node: Node) -> bool:
        """Whether a layer, or product of two tensors, sums products of codes."""
        specs = [self.spec(site) for site in operands(node)]
        return all(spec is not None and multiplied_as_integers(spec.levels) for spec in specs)


FLOAT = Scheme(FLOAT_BITS, None)
"""Of a network that stays in float; `resolve` makes no plan of it."""
SCHEME = r"w(?P<w>[1-8])(?P<share>t|g[1-9]\d{0,4})?(?:a(?P<a>[2-8]|16))?"


def parse_scheme(text: str) -> Scheme:
    """Reads `w{2..8}a{2..8}` and its kin.

    Args:
      text: `w4a8`; `w4` for weights alone, activations staying in float; `w8a16` for activations
        on a 16-bit grid. After the bits of weights, `g64` for scales of groups of 64 input channels
        (`w4g64`), `t` for one scale a kernel (`w8ta8`). `w1a8`: kernels of signs.

    Raises:
      PlanError: on anything else.
    """
    found = re.fullmatch(SCHEME, text.strip().lower())
    if found is None:
        raise PlanError(
            f"scheme {text!r} is not w{{2..8}}a{{2..8}}; w8a8 and w4a8 are common. w8a16 has "
            "activations of 16 bits; w8 and w4g64 quantize weights alone, g64 with a scale for "
            "every 64 input channels; w8ta8 has one scale a kernel; w1a8 has kernels of signs."
        )
    bits = None if found["a"] is None else int(found["a"])
    return Scheme(int(found["w"]), bits, sharing_of(found["share"]) or "channel")


def sharing_of(written: str | None) -> Sharing | None:
    """The sharing behind the bits of weights; None if there is none."""
    if written is None:
        return None
    if written.startswith("g"):
        return int(written[1:])
    return "tensor" if written == "t" else "channel"


def sharing_in(grid: Grid) -> Sharing:
    """Which weights of a kernel on a grid share a scale."""
    return grid.group or ("tensor" if grid.axis is None else "channel")


def weight_spec(op: Weighted, bits: int, observer: Observer, sharing: Sharing = "channel") -> Spec:
    """Weights: symmetric int8 at 8 bits and 7, with a zero point below, of 1 bit signs.

    Pairs of products of kernels below 8 bits with bytes then fit in 16 bits, to which processors
    with AVX2 and without VNNI saturate them: 2 * 255 * 63 < 2**15.

    ONNX scales a transposed convolution along output channels *of a group*: with several groups,
    one scale must do; of one group they have scales of output channels, never of groups of inputs.
    """
    transposed = isinstance(op, ConvTranspose2d)
    axis = None if sharing == "tensor" or (transposed and op.groups > 1) else -1
    group = sharing if isinstance(sharing, int) and not transposed else None
    if bits == 1 and group is not None:
        raise PlanError("signs have a scale for each output channel or kernel, not for groups.")
    levels = Signs(axis) if bits == 1 else Grid(bits, bits >= 7, axis, group)
    return Spec(levels, observer)


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
        quantized, where layers read them; `zsq_all_rectified`: for whoever reads them, shortcuts
        and pooling too (GDFQ's code); `qdrop_8bit_ends`: first and last kernels and the last
        layer's input at 8 bits; `brecq_8bit_ends_second`: also the input of the second layer;
        `..._shortcuts`: also what other operators read of a tensor that layers read with fewer.
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
    fewest = 2 if layers == "zsq_all_rectified" else 8
    least = None if scheme.activation_bits is None else max(scheme.activation_bits, fewest)
    ruled = dict(preset)
    for rule in rules:
        apply_rule(ruled, preset, rule)
    bits = {name: ruled[name] for name in preset if name in ruled}
    if not bits:
        raise PlanError("no layer is left to quantize: the rules keep all of them in float.")
    of_kernel = lambda op, want: weight_spec(op, want.weight, observers.weights, want.sharing)
    kernels = [
        (Site(n.name), of_kernel(n.op, bits[n.name]))
        for n in graph.nodes
        if isinstance(n.op, WEIGHTED) and n.name in bits
    ]
    groups = tensor_groups(graph, READING.get(layers, "all"))
    parted = with_shortcuts(graph, groups, preset) if "shortcuts" in layers else groups.items()
    edges, kept = [], []
    for tensor, sites in parted:
        read = [bits[s.node].inputs for s in sites if s.node in bits]
        wanted = [b for b in read if b is not None]
        kept_float = any(s.node in preset for s in sites)  # once nobody wanted bits for it
        if not wanted and (kept_float or layers == "zsq_all_low" or least is None):
            continue
        spec = Spec(Grid(max(wanted, default=least or 8)), observers.activations)
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


def on_other_levels(plan: Plan, levels: Mapping[Site, Levels]) -> Plan:
    """The plan with other levels at some of its sites."""
    entries = tuple(
        (site, dataclasses.replace(spec, levels=levels.get(site, spec.levels)))
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


class Wanted(NamedTuple):
    """Bits that a layer should have.

    Attributes:
      weight: of its kernel.
      inputs: of what it reads; None for float.
      sharing: which weights share a scale.
    """

    weight: int
    inputs: int | None
    sharing: Sharing


def layer_bits(graph: Graph, scheme: Scheme, layers: LayerPreset) -> dict[str, Wanted]:
    """What a preset wants for each layer; a product of two tensors has inputs only."""
    w, a, sharing = scheme.weight_bits, scheme.activation_bits, scheme.sharing
    fine = None if a is None else max(a, 8)
    bits = {n.name: Wanted(w, a, sharing) for n in products(graph)}
    nodes = weighted_nodes(graph)
    if layers not in READING and nodes:
        second = layers.startswith("brecq_8bit_ends_second")
        ends = (nodes[0].name, nodes[-1].name, *last_weighted(graph))
        alone = "tensor" if sharing == "tensor" else "channel"
        bits |= dict.fromkeys(ends, Wanted(8, fine, alone))
        if second and len(nodes) > 2 and nodes[1].name not in ends:
            bits[nodes[1].name] = Wanted(w, fine, sharing)
    return bits


def apply_rule(bits: dict[str, Wanted], preset: dict[str, Wanted], rule: Rule) -> None:
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
            w, a, sharing = bits.get(name, preset[name])
            wanted = rule.weight_bits or w, rule.input_bits or a, rule.sharing or sharing
            bits[name] = Wanted(*wanted)


def check_rule(rule: Rule) -> None:
    """Refuses a rule that asks for nothing, or for bits or groups that there are none of.

    Raises:
      PlanError: naming it.
    """
    asked = {"weight_bits": rule.weight_bits, "input_bits": rule.input_bits}
    for name, bits in asked.items():
        wide = name == "input_bits" and bits == WIDE
        least = 1 if name == "weight_bits" else 2
        if bits is not None and not (least <= bits <= 8 or wide):
            raise PlanError(f"rule {rule.pattern!r} has {name} {bits}; there are {least} to 8.")
    if isinstance(rule.sharing, int) and rule.sharing < 1:
        raise PlanError(f"rule {rule.pattern!r} has groups of {rule.sharing}; write 1 or more.")
    if not rule.keep_float and not any(asked.values()) and rule.sharing is None:
        raise PlanError(
            f"rule {rule.pattern!r} asks for nothing: give weight_bits, input_bits or keep_float."
        )
