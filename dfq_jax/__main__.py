"""`python -m dfq_jax` is `dfq`."""

import os

from dfq_jax.base.interrupts import leave_at_once

LOG_OF_XLA, NOTHING = "TF_CPP_MIN_LOG_LEVEL", "3"
"""Which of its messages XLA writes to the terminal, alarms about slow compiling among them. It is
read when JAX is imported; what fails in XLA is an exception besides."""


def main() -> None:
    """Entry point of `dfq`: minds Ctrl-C before it imports what takes long."""
    leave_at_once()
    os.environ.setdefault(LOG_OF_XLA, NOTHING)
    from dfq_jax.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
