"""A budget of milliseconds as one of work: how much a network may compute to be fast enough here.

What a processor takes is no sum over layers, so it is measured: channels go by their size alone,
the smaller network is written as the integer file it will be, with ranges that mean nothing, and
ONNX Runtime runs it. A few such files tell how much work fits.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from dfq_jax.api.request import Asked
from dfq_jax.errors import BudgetError, UsageError
from dfq_jax.graph.coupling import Coupling, coupled_channels
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.latency import median_ms
from dfq_jax.numerics.affine import Affine
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.select import Kept, select, standing
from dfq_jax.pruning.budget import Ceiling, Deadline, by_budget, least_share
from dfq_jax.pruning.choose import never_empty
from dfq_jax.pruning.criteria import CRITERIA
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruning, what_may_go
from dfq_jax.quantization.calibrate import fit_edges, fit_kernels
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import FLOAT, resolve
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.training.in_float import NO_LEVELS

HALVINGS = 5
"""Times that the share of work is narrowed down by half."""
SIZE = "l2"
"""By what channels go in networks that are only timed."""


def in_time(
    subject: Subject, how: Pruning, deadline: Deadline, asked: Asked, watch: Watcher
) -> Ceiling:
    """The most work with which a pruned network meets a deadline on this machine.

    Args:
      subject: the network.
      how: it is pruned; its share is not looked at.
      deadline: to be met.
      asked: how what is left is quantized.
      watch: told what was measured.

    Raises:
      BudgetError: if the smallest network is too slow; names what that takes.
      UsageError: for kernels with scales for groups of inputs.
      ImportError: if ONNX Runtime is not installed.
    """
    timed = timer(subject, how, asked)
    least = least_share(subject, what_may_go(subject, how).groups, floor=how.floor)
    fastest, whole = timed(least), timed(1.0)
    watch.says(
        f"  {whole:.2f} ms as it is, {fastest:.2f} ms with the fewest channels that may stay"
    )
    if fastest > deadline.ms:
        raise BudgetError(
            f"budget {deadline} is out of reach on this machine: with the fewest channels that may "
            f"stay, an image takes {fastest:.2g} ms; allow that much, or let all channels go "
            '(`channels="all"`).'
        )
    low, high = (1.0, 1.0) if whole <= deadline.ms else (least, 1.0)
    for _ in range(HALVINGS if high > low else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if timed(middle) <= deadline.ms else (low, middle)
    watch.says(f"  {deadline} allow about {100 * low:.0f} % of its multiplications")
    return Ceiling(low, "macs", relative=True)


def timer(subject: Subject, how: Pruning, asked: Asked) -> Callable[[float], float]:
    """share of the work -> milliseconds an image of the integer network, pruned to it."""
    found, scores = what_may_go(subject, how), CRITERIA[SIZE].score(subject)
    whole, coupled = stand_in(subject, asked), coupled_channels(subject.folded)
    if len(coupled) != len(subject.coupled):
        raise BudgetError(
            "this network cannot be timed at other sizes before it is pruned: give the budget as a "
            'share, such as "50% MACs".'
        )

    def timed(share: float) -> float:
        ceiling = Ceiling(share, "macs", relative=True)
        chosen = by_budget(subject, found.groups, scores, ceiling, floor=how.floor, price=how.price)
        kept = never_empty(subject.coupled, scores, chosen).kept
        return median_ms(serialize(quantized_onnx(narrowed_to(whole, coupled, kept))))

    return timed


def stand_in(subject: Subject, asked: Asked) -> QuantizedModel:
    """The network on grids whose ranges mean nothing: it takes the time of any other.

    Raises:
      UsageError: for kernels with scales for groups of inputs.
    """
    pipeline = asked.pipeline
    if pipeline.scheme == FLOAT:
        return QuantizedModel(subject.folded, NO_LEVELS, {})
    if pipeline.scheme.sharing not in ("channel", "tensor"):
        raise UsageError(
            f"scheme {pipeline.scheme} computes in float and has scales for groups of inputs: a "
            'budget of milliseconds needs another, or say how much work is left ("50% MACs").'
        )
    how = pipeline.scheme, pipeline.layers, pipeline.rules, Observers(MinMax(), MinMax())
    plan = resolve(subject.folded.graph, *how)
    ends = {tensor: (jnp.zeros(()), jnp.ones(())) for tensor, _ in plan.groups}
    edges = fit_edges(subject.folded, plan, None, {}, settled=ends)
    kernels = fit_kernels(subject.folded, plan, edges)
    return QuantizedModel(subject.folded, plan, {**edges, **kernels})


def narrowed_to(whole: QuantizedModel, coupled: Coupling, kept: Kept) -> QuantizedModel:
    """A quantized network with the channels of some sets only, and their scales."""
    stays, qparams = standing(coupled, kept), dict(whole.qparams)
    for site, found in whole.affines.items():
        axes = coupled.slots.get(site.node, {}).get("kernel")
        if site.argument is None and axes is not None and np.size(found.scale) > 1:
            cut = lambda v, there=stays[axes[-1]]: np.compress(there, np.asarray(v), -1)
            qparams[site] = Affine(cut(found.scale), cut(found.zero_point))
    return QuantizedModel(select(whole.model, coupled, kept), whole.plan, qparams)
