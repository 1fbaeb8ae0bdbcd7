"""Samples kept apart by the spectrum of their similarities: DSG's term as its journal has it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.terms.base import EPS, Observed, similarities

MAGNITUDE = 1e-4
"""Weight of the eigenvalues' distance beside that of the eigenvectors, as released."""
FLAT = 1e-8
"""Squared distance of eigenvalues below which their vectors' slopes are damped."""


def spectral_correlation(observed: Observed) -> Float[Array, ""]:
    """`spectral_distance` of the images to fresh Gaussian noise, over the number of batch norms.

    Reference:
      Qin et al. 2023, "Diverse Sample Generation", sample correlation inhibition, as released.
    """
    noise = jax.random.normal(observed.key, observed.natural.shape)
    return spectral_distance(observed.natural, noise) / max(len(observed.targets), 1)


def spectral_distance(
    images: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """How far the spectrum of images' similarities is from that of noise.

    With eigenvalues `l_k` and vectors `u_k` of the cosine similarities of both, and `w_k` the
    noise's eigenvalues brought to 0..1:

        1e-4 mean_k (l_k - l'_k)^2 + |sum_k w_k (-u_k . u'_k)|

    Eigenvectors of what is nearly the identity are arbitrary in order and sign, so the second part
    is mostly noise itself; `terms.base.correlation` is the closed form of what is meant.

    Reference:
      Qin et al. 2023, "Diverse Sample Generation", as released.
    """
    values, vectors = spectrum(similarities(images))
    wanted, others = spectrum(jax.lax.stop_gradient(similarities(noise)))
    reach = jnp.maximum(jnp.max(wanted) - jnp.min(wanted), EPS)
    weights = (wanted - jnp.min(wanted)) / reach
    along = jnp.sum(vectors * others, axis=0)
    return MAGNITUDE * jnp.mean((values - wanted) ** 2) + jnp.abs(jnp.sum(weights * along))


@jax.custom_jvp
def spectrum(matrix: Float[Array, "b b"]) -> tuple[Float[Array, " b"], Float[Array, "b b"]]:
    """Eigenvalues, rising, and eigenvectors in columns; slopes are finite for equal values too."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@spectrum.defjvp
def spectrum_slopes(primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    """`dl_k = u_k' dA u_k`, `du_k = sum_i u_i (u_i' dA u_k) / (l_k - l_i)`."""
    values, vectors = spectrum(*primals)
    (change,) = tangents
    inner = vectors.T @ ((change + change.T) / 2) @ vectors
    gaps = values[None, :] - values[:, None]
    turned = vectors @ (inner * gaps / (gaps**2 + FLAT))
    return (values, vectors), (jnp.diagonal(inner), turned)
