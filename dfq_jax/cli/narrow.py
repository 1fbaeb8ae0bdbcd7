"""What `dfq narrow` does: the file of one width of a network that has many."""

from pathlib import Path

from dfq_jax.api.functions import narrow
from dfq_jax.cli.delivery import emit
from dfq_jax.errors import QualityError
from dfq_jax.report.console import Terminal


def narrow_to(folder: Path, bits: int, output: Path, terminal: Terminal) -> None:
    """`dfq narrow`.

    Raises:
      QualityError: if the file does not compute what the width does.
    """
    found = narrow(folder, bits, output)
    size = output.stat().st_size
    terminal.say(f"{output}: weights of {bits} bits, {size:,} bytes, verified: {found.passed}")
    emit(terminal, {"file": str(output), "bits": bits, "bytes": size, "verified": found.passed})
    if not found.passed:
        raise QualityError(f"{output} does not compute what its width does: {found.failures[0]}.")
