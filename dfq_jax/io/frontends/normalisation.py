"""How images are normalised, as a user or a file says it, and what nobody says."""

import dataclasses
from collections.abc import Sequence

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.io.frontends.volume_inputs import with_range
from dfq_jax.normalisation import IMAGENET_MEAN, listed
from dfq_jax.types import InputContract, Values

Numbers = Sequence[float]
SMALL_IMAGES = 64
"""Pixels along the sides of the images of CIFAR and its kind, at most."""


def as_normalised(
    model: Model, where: str, mean: Numbers | None, std: Numbers | None
) -> tuple[Model, tuple[str, ...]]:
    """A network with the normalisation that the user states, and notes on it.

    Raises:
      UsageError: if only one of the two is given, or they fit nothing that it reads.
    """
    read = model.input
    if isinstance(read, InputContract):
        contract = with_normalisation(read, mean, std)
        notes = (*contradiction(read, contract), *assumptions(contract))
        return dataclasses.replace(model, inputs=(contract,)), notes
    if mean is None and std is None:
        return model, ()
    if not isinstance(read, Values) or mean is None or std is None:
        raise UsageError(f"{where} reads {read}: leave out `mean=` and `std=`.")
    return dataclasses.replace(model, inputs=(with_range(read, mean, std),)), ()


def contradiction(before: InputContract, after: InputContract) -> tuple[str, ...]:
    """A note where the user normalises otherwise than the file or the architecture says."""
    if before.assumed or (before.mean, before.std) == (after.mean, after.std):
        return ()
    said = (f"mean {listed(c.mean)}, std {listed(c.std)}" for c in (before, after))
    return ("the network says {}; what you give is used: {}".format(*said),)


def with_normalisation(
    contract: InputContract, mean: Numbers | None, std: Numbers | None
) -> InputContract:
    """The contract with the normalisation the user states.

    Raises:
      UsageError: if only one of the two is given, or they fit no image of this network.
    """
    if mean is None and std is None:
        return contract
    if mean is None or std is None:
        raise UsageError("give mean and std together: images are (pixel / 255 - mean) / std.")
    spread = [tuple(v) * (contract.channels if len(v) == 1 else 1) for v in (mean, std)]
    if any(len(v) != contract.channels for v in spread):
        raise UsageError(
            f"mean and std need one number, or one for each of the {contract.channels} channels; "
            f"got {len(mean)} and {len(std)}."
        )
    try:
        return dataclasses.replace(contract, mean=spread[0], std=spread[1], assumed=False)
    except ValueError as error:
        raise UsageError(str(error)) from None


def assumptions(contract: InputContract) -> tuple[str, ...]:
    """What nobody stated about the input and had to be guessed."""
    if not contract.assumed:
        return ()
    if not contract.is_picture:
        low, high = contract.value_range
        return (
            f"nothing says between which values its input lies: taken for {low:g} to {high:g}; "
            "state `mean=` and `std=` if not, so that -mean / std is the least and (1 - mean) / "
            "std the largest",
        )
    mean, std = (
        ", ".join(f"{v:g}" for v in dict.fromkeys(t)) for t in (contract.mean, contract.std)
    )
    small = max(contract.height, contract.width) <= SMALL_IMAGES
    more = "; these are ImageNet's, and networks for images this small mostly have their own"
    return (
        f"nothing says how images are normalised: assumed (pixel / 255 - mean) / std, mean {mean}, "
        f"std {std}, for {contract.channels} channels; state it with `mean=` and `std=` if not"
        f"{more if small and contract.mean == IMAGENET_MEAN else ''}",
    )
