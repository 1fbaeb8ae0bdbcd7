"""Where `dfq` begins: it answers Ctrl-C while the rest is still being imported."""

import os
import sys


def main() -> None:
    """Imports the program, which takes seconds, and runs it."""
    try:
        from dfq_jax.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was begun.\n")
        sys.stderr.flush()
        os._exit(130)
    run()
