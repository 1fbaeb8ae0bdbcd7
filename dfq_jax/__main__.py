"""`python -m dfq_jax` is `dfq`."""

from dfq_jax.cli import main

main()
