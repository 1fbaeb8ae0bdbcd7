"""Examples of what a network reads: made from it or given, and what they are evidence of."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from jaxtyping import Array, Float, Shaped

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.types import Input, InputContract, in_words

Evidence = Literal["statistics", "estimates", "noise", "peaks", "given"]
"""What examples show of the data that a network was trained on.

`statistics`: those that it recorded, what its weights respond to, or text that it samples.
`estimates`: statistics that nobody recorded, estimated from its weights. `noise`: nothing. `peaks`:
how large each activation gets, at which ranges end. `given`: a user brought them, as a camera took
them.
"""
METHODS: Mapping[str, Evidence] = {
    "gzsq": "estimates",
    "noise": "noise",
    "aac": "peaks",
    "given": "given",
}
"""{method in provenance: what its images are evidence of}, where nothing else says it."""


def evidence_in(provenance: Mapping[str, Any]) -> Evidence:
    """What examples are evidence of whose file says only how they were made."""
    if (said := provenance.get("evidence")) in get_args(Evidence):
        return cast(Evidence, said)
    return METHODS.get(str(provenance.get("method")), "statistics")


@dataclasses.dataclass(frozen=True, repr=False)
class Examples:
    """Examples of the inputs of a network, with where they came from.

    Attributes:
      arrays: one for each input, examples along the first axis; images are NHWC float32, already
        normalised by their contract, of no fixed range.
      inputs: what they satisfy, as the network states it.
      provenance: how they were made, for people: method, seed, steps, hash of the weights,
        versions; plain JSON data.
      evidence: what they show; decisions rest on this.
    """

    arrays: tuple[Array, ...]
    inputs: tuple[Input, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evidence: Evidence = "statistics"

    def __post_init__(self) -> None:
        """Raises UsageError unless there are equally many examples of every input."""
        counts = {len(array) for array in self.arrays}
        if len(self.arrays) != len(self.inputs) or len(counts) != 1:
            shapes = ", ".join(str(array.shape) for array in self.arrays)
            raise UsageError(
                f"examples of {in_words(self.inputs)} are arrays of equal length, one for each; "
                f"got {shapes or 'none'}."
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.arrays[0])

    def __repr__(self) -> str:
        """One line, without the arrays."""
        return f"<Examples: {len(self)} of {in_words(self.inputs)}, evidence: {self.evidence}>"

    @property
    def input(self) -> Input:
        """What these satisfy, of a network with one input.

        Raises:
          UnsupportedModelError: for examples of several.
        """
        if len(self.inputs) == 1:
            return self.inputs[0]
        raise UnsupportedModelError(f"this works with one input, not with {in_words(self.inputs)}.")

    @property
    def array(self) -> Shaped[Array, "n ..."]:
        """The examples of the one input, whatever that is.

        Raises:
          UnsupportedModelError: for examples of several.
        """
        _ = self.input
        return self.arrays[0]

    @property
    def images(self) -> Float[Array, "n h w c"]:
        """The images of a network that reads one.

        Raises:
          UnsupportedModelError: for others.
        """
        _ = self.contract
        return self.arrays[0]

    @property
    def contract(self) -> InputContract:
        """What these images satisfy.

        Raises:
          UnsupportedModelError: for examples of other inputs.
        """
        if len(self.inputs) == 1 and isinstance(self.inputs[0], InputContract):
            return self.inputs[0]
        raise UnsupportedModelError(f"this works with images, not with {in_words(self.inputs)}.")

    @property
    def given(self) -> bool:
        """Whether a user brought them; else they were made from a network."""
        return self.evidence == "given"

    @property
    def guessed(self) -> bool:
        """Whether they owe nothing to recorded statistics or a camera."""
        return self.evidence in ("noise", "estimates")

    def split(self, held_out: int) -> tuple["Examples", "Examples"]:
        """The first `n - held_out` examples to calibrate with, the last `held_out` to judge by."""
        if not 0 < held_out < len(self):
            raise ValueError(f"cannot hold out {held_out} of {len(self)} examples.")
        cut = len(self) - held_out
        part = lambda rows: dataclasses.replace(self, arrays=tuple(x[rows] for x in self.arrays))
        return part(slice(cut)), part(slice(cut, None))
