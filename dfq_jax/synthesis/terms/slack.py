"""DSG's tolerances: how far Gaussian noise itself is from the batch-norm statistics."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.graph.graph import Model
from dfq_jax.synthesis.sources.pixels import from_natural, gaussian
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.match import (
    Gap,
    Slack,
    enhanced,
    layer_losses,
    recorded_std,
    unbiased_std,
    usable_gap,
)
from dfq_jax.synthesis.terms.targets import Targets, observe


def slack_margins(
    model: Model,
    targets: Targets,
    key: Key[Array, ""],
    *,
    quantile: float = 0.9,
    count: int = 1024,
    batch: int = 32,
    variances: bool = False,
) -> Slack:
    """One tolerance for means and one for deviations per layer.

    Args:
      model: unfolded network.
      targets: recorded moments.
      key: randomness of the noise.
      quantile: epsilon of the paper, in (0, 1]; 0.9 is its best.
      count: noise images N(0, 1) in natural units; statistics are averaged over them.
      batch: images per forward pass.
      variances: the second tolerance is of variances instead of deviations.

    Returns:
      {batch norm: (delta, gamma)}: the `quantile` over channels of the gaps of the noise.

    Raises:
      ValueError: if `quantile` is not in (0, 1].

    Reference:
      Zhang et al. 2021, "Diversifying Sample Generation".
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"slack_margins() needs 0 < quantile <= 1, got {quantile}.")
    batch = min(batch, count)
    keys = jax.random.split(key, -(-count // batch))
    gaps = noise_gaps(model, targets, keys, batch, variances=variances)
    tolerance = lambda gap: jnp.quantile(jnp.abs(gap), quantile)
    return {name: (tolerance(gap.mean), tolerance(gap.spread)) for name, gap in gaps.items()}


@partial(jax.jit, static_argnames=("batch", "variances"))
def noise_gaps(
    model: Model, targets: Targets, keys: Key[Array, " chunks"], batch: int, *, variances: bool
) -> dict[str, Gap]:
    """{batch norm: gap per channel} of statistics averaged over noise images."""
    of = (lambda s: s.var) if variances else unbiased_std
    recorded = (lambda t: t.var) if variances else recorded_std

    def chunk(total, key):
        noise = gaussian(key, (batch, *model.contract.shape))
        stats = observe(model, targets, from_natural(noise, model.contract)).stats
        sums = {k: (s.mean.mean(0), of(s).mean(0)) for k, s in stats.items()}
        return jax.tree.map(jnp.add, total, sums), None

    zeros = {k: (jnp.zeros_like(t.mean), jnp.zeros_like(t.mean)) for k, t in targets.items()}
    sums, _ = jax.lax.scan(chunk, zeros, keys)
    found = {}
    for name, (mean, std) in sums.items():
        target = targets[name]
        off = mean / len(keys) - target.mean, std / len(keys) - recorded(target)
        found[name] = usable_gap(*off, target)
    return found


def exactly(model: Model, targets: Targets, key: Key[Array, ""]) -> None:
    """No tolerances."""
    del model, targets, key


def slack_match(factor: float, observed: Observed, *, once: bool) -> Float[Array, ""]:
    """SDA, distances beyond the tolerances; LSE, a layer counts more in each sample."""
    return enhanced(layer_losses(observed, observed.shared), factor, once=once)
