"""Networks after all of a surgery are files like any other: they run, and agree to one step."""

import pytest

from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.verification.verify import verify
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.dfq import dfq

EVERYTHING = Surgery("groups", "replace", absorb=True, split=0.1)


@pytest.mark.parametrize(
    ("scheme", "net"), [("w8a8", "tiny"), pytest.param("w4a8", "shuffle", marks=pytest.mark.slow)]
)
def test_all_ways_to_run_it_agree(scheme, net, nets):
    model = getattr(nets, net)()
    x = nets.images(model, 8)
    made = dfq(model, x, parse_scheme(scheme), surgery=EVERYTHING, reestimate=True)
    old, new = (m.params for m in (model, made.reference))
    assert any(new[k]["kernel"].size > old[k]["kernel"].size for k in new if "kernel" in new[k])
    found = verify(made.quantized, serialize(quantized_onnx(made.quantized)), x, batch=8)
    assert found.most_steps <= 1
    assert found.agreement == 1.0
