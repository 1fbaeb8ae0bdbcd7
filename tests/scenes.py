"""What a term of image synthesis sees, made by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.targets import Stats, Target

NONE = Observed(
    images=jnp.zeros((1, 2, 2, 3)),
    natural=jnp.zeros((1, 2, 2, 3)),
    logits=jnp.zeros((1, 2)),
    stats={},
    taps={},
    targets={},
    shared=(),
    labels=(),
    memory=(),
    turn=jnp.zeros((), jnp.int32),
    step=jnp.zeros((), jnp.int32),
    key=jax.random.key(0),
)


def observed(**given: Any) -> Observed:
    """An `Observed` with what is given, arrays as float32; the rest is left empty."""
    floats = {k: jnp.asarray(v, jnp.float32) for k, v in given.items() if k in ("images", "logits")}
    if "images" in floats:
        given.setdefault("natural", floats["images"])
    return NONE._replace(**given | floats)


def stats_of(x: Any) -> Stats:
    """Statistics of Float[b h w c] by NumPy, in double precision."""
    x = np.asarray(x, np.float64)
    mean, var = (jnp.asarray(v, jnp.float32) for v in (x.mean((1, 2)), x.var((1, 2))))
    return Stats(mean, var, x.shape[1] * x.shape[2])


def target(mean: Any, var: Any, usable: Any = None) -> Target:
    """Recorded moments, all channels usable unless said."""
    mean, var = (jnp.asarray(v, jnp.float32) for v in (mean, var))
    usable = jnp.ones(mean.shape, bool) if usable is None else jnp.asarray(usable, bool)
    return Target(mean, var, usable)
