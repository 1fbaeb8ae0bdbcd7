"""Methods of the literature that a name alone cannot ask for, and how they are had."""

from collections.abc import Collection, Mapping

from dfq_jax.errors import UsageError, check_choice

REAL_IMAGES = (
    "it looks at a real image of each class. Train by `fdda_qat` with `images=`, or make images in "
    "Python by `dfq.methods.fdda(dfq.parts.class_centres(...))`"
)
NO_FILE = (
    "its learned levels have no ONNX form, so no file can be made. In Python there is {how}, whose "
    "networks are simulated and judged in JAX"
)
ELSEWHERE: Mapping[str, str] = {
    "fdda": REAL_IMAGES,
    "lq_nets": NO_FILE.format(how="`dfq.methods.lq_nets`"),
    "lq_nets_qat": NO_FILE.format(how="`dfq.methods.lq_nets_qat`"),
}
"""{name: why it is none of the command line's, and where it is}."""


def check_method(what: str, name: str, choices: Collection[str]) -> None:
    """Refuses the name of a method that is not among those there are.

    Args:
      what: it names, for the message.
      name: of the method.
      choices: all there are.

    Raises:
      UsageError: saying where the method is, if it is elsewhere; else as of `check_choice`.
    """
    if name not in choices and name in ELSEWHERE:
        raise UsageError(f"{what} {name!r}: {ELSEWHERE[name]}.")
    check_choice(what, name, choices)
