import jax
import jax.numpy as jnp

from dfq_jax.optim.compiling import compile_clock


def test_compilations_inside_are_noted_and_no_others():
    program = jax.jit(lambda x: x * 3 + 1)
    with compile_clock() as seconds:
        program(jnp.ones(7))
        first = list(seconds)
        program(jnp.ones(7))
        assert seconds == first
    assert len(first) >= 1
    assert min(first) > 0
    program(jnp.ones(8))
    assert seconds == first
