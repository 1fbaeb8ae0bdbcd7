"""The numbers a quantized tensor may hold, of every kind: uniform grids, signs, learned bases.

Each kind has a static half, which says what codes there are, and a traced half of parameters, which
says what they stand for. New kinds (bit planes of which any number may be read, tables) are one
case more in each function here.
"""

import dataclasses
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from dfq_jax.errors import PlanError
from dfq_jax.numerics.affine import (
    Affine,
    Grid,
    NumpyOrJax,
    dequantize,
    fake_quantize,
    quantize,
    spread,
)
from dfq_jax.numerics.basis import Basis, LearnedLevels, assign, level_of, on_basis
from dfq_jax.numerics.signs import Alpha, Signs, on_signs, signs_of

Levels = Grid | Signs | LearnedLevels
Parameters = Affine | Alpha | Basis


def codes_of(x: Float[NumpyOrJax, "..."], levels: Levels, parameters: Parameters) -> NumpyOrJax:
    """The codes nearest to `x`, in the storage type of its levels.

    Raises:
      PlanError: if the parameters are of another kind than the levels.
    """
    match levels, parameters:
        case Grid(), Affine():
            return quantize(x, parameters, levels)
        case Signs(), Alpha():
            return signs_of(x)
        case LearnedLevels(), Basis():
            found = assign(levels.rows(x), parameters)
            return levels.whole(found, x.shape).astype(levels.dtype)
        case _:
            unlike(levels, parameters)


def values_of(
    codes: Integer[NumpyOrJax, "..."], levels: Levels, parameters: Parameters
) -> NumpyOrJax:
    """What codes stand for, float32.

    Raises:
      PlanError: if the parameters are of another kind than the levels.
    """
    match levels, parameters:
        case Grid(), Affine():
            return dequantize(codes, spread(parameters, codes.shape, levels))
        case Signs(), Alpha():
            return codes.astype(jnp.float32) * parameters.scale
        case LearnedLevels(), Basis():
            rows = levels.rows(codes).astype(jnp.int32)
            return levels.whole(level_of(rows, parameters), codes.shape)
        case _:
            unlike(levels, parameters)


def on_levels(x: Float[Array, "..."], levels: Levels, parameters: Parameters) -> Array:
    """`values_of(codes_of(x))`, differentiable by `x` and by what may be trained.

    Rounding has the gradient of the identity within the range of the levels.

    Raises:
      PlanError: if the parameters are of another kind than the levels.
    """
    match levels, parameters:
        case Grid(), Affine():
            return fake_quantize(x, parameters, levels)
        case Signs(), Alpha():
            return on_signs(x, parameters)
        case LearnedLevels(), Basis():
            return levels.whole(on_basis(levels.rows(x), parameters), x.shape)
        case _:
            unlike(levels, parameters)


def unlike(levels: Levels, parameters: Parameters) -> NoReturn:
    """Refuses parameters of another kind.

    Raises:
      PlanError: naming both.
    """
    raise PlanError(
        f"levels {levels} have no parameters like {type(parameters).__name__}; give a Grid an "
        "Affine, Signs an Alpha, LearnedLevels a Basis."
    )


def multiplied_as_integers(levels: Levels) -> bool:
    """Whether integer kernels multiply these codes: of a byte at most, one scale an output."""
    match levels:
        case Grid(bits=bits, group=group):
            return bits <= 8 and group is None
        case Signs():
            return True
        case LearnedLevels():
            return False


def affine_of(parameters: Parameters) -> Affine:
    """Scale and zero point of a uniform grid.

    Raises:
      PlanError: for parameters of other levels.
    """
    if not isinstance(parameters, Affine):
        raise PlanError(
            f"this works on uniform grids only, got {type(parameters).__name__}; quantize to 2 to "
            "8 bits instead."
        )
    return parameters


def scales_of(parameters: Parameters) -> Float[NumpyOrJax, "..."]:
    """What of the parameters may be trained: scales, or the vectors of a basis. All float32."""
    return parameters.vectors if isinstance(parameters, Basis) else parameters.scale


def with_scales(parameters: Parameters, scales: Float[NumpyOrJax, "..."]) -> Parameters:
    """The parameters with other scales; what is not trained stays."""
    if isinstance(parameters, Basis):
        return parameters._replace(vectors=scales)
    return parameters._replace(scale=scales)


@partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "parameters"], meta_fields=["levels"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A quantized tensor: one pytree, which crosses `jit` and can be held, sliced and saved.

    Attributes:
      codes: integers, output channels last.
      parameters: what they stand for, traced.
      levels: which codes there are, static.
    """

    codes: Integer[Array, "..."]
    parameters: Parameters
    levels: Levels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes and of the values."""
        return self.codes.shape

    @property
    def scales(self) -> Float[Array, "..."]:
        """What may be trained, apart from codes and zero points."""
        return scales_of(self.parameters)

    def with_scales(self, scales: Float[Array, "..."]) -> "QuantizedArray":
        """The same codes with other scales."""
        return dataclasses.replace(self, parameters=with_scales(self.parameters, scales))

    def dequantize(self) -> Float[Array, "..."]:
        """The values."""
        return values_of(self.codes, self.levels, self.parameters)

    def channels(self, chosen: slice) -> "QuantizedArray":
        """Some of the output channels, with their parameters."""
        parameters = self.parameters
        if self.levels.axis is not None:
            if isinstance(parameters, Basis):
                parameters = parameters._replace(vectors=parameters.vectors[chosen])
            else:
                parameters = jax.tree.map(lambda v: v[..., chosen], parameters)
        return QuantizedArray(self.codes[..., chosen], parameters, self.levels)


def quantized(x: Float[Array, "..."], levels: Levels, parameters: Parameters) -> QuantizedArray:
    """A tensor on its levels.

    Raises:
      PlanError: if the parameters are of another kind than the levels.
    """
    return QuantizedArray(codes_of(x, levels, parameters), parameters, levels)
