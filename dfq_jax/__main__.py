"""`python -m dfq_jax` is `dfq`."""

from dfq_jax.base.interrupts import leave_at_once


def main() -> None:
    """Entry point of `dfq`: minds Ctrl-C before it imports what takes long."""
    leave_at_once()
    from dfq_jax.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
