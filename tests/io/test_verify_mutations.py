"""Small damages to real files: none may verify. `benchmarks/damaged_files.py` makes many more."""

import collections

import file_mutations
import pytest

from dfq_jax.errors import DataError
from dfq_jax.io.verification.verify import verify

pytestmark = pytest.mark.usefixtures("unoptimized")


NETWORKS = (("residual", "w8a8"), ("unet", "w5a6"), ("vgg", "w4a8"))


def first_failure(q, data, x):
    """What verification says; nothing if the file passes."""
    try:
        return "".join(verify(q, data, x).failures[:1])
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(("net", "scheme"), NETWORKS)
def test_no_damaged_file_verifies(onnx_nets, net, scheme):
    q, file = onnx_nets.quantized(net, scheme), onnx_nets.integer_file(net, scheme)
    x = onnx_nets.images(q.model, 4, seed=5)
    seen = collections.Counter()
    for kind, where, data in file_mutations.mutations(file, 14):
        seen[kind] += 1
        assert first_failure(q, data, x).startswith("the file is not what was exported"), where
    assert seen.total() == 14
    assert len(seen) >= 10


def test_the_first_difference_is_named(onnx_nets):
    """A damage that nothing runs is told as damage, not as a fault of the runtime."""
    q = onnx_nets.quantized("residual")
    file = onnx_nets.integer_file("residual")
    made = {m.kind: m for m in file_mutations.mutations(file, 12)}
    flipped = verify(q, made["bit of a kernel"].file, onnx_nets.images(q.model, 2))
    assert made["bit of a kernel"].where.split()[-1] in flipped.failures[0]
    scaled = verify(q, made["scale + 2 %"].file, onnx_nets.images(q.model, 2))
    assert made["scale + 2 %"].where.split()[0] in scaled.failures[0]
