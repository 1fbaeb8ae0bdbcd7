"""What `dfq.quantize` hands to the choice of bits within a budget."""

import dfq_jax as dfq
from dfq_jax.io.onnx_out import quantized_onnx
from dfq_jax.quantize.costs import cost_of


def test_bytes_of_biases_that_correction_adds_are_within_the_budget(nets):
    model = nets.dense()
    images = dfq.ImageSet(nets.images(model, 8), model.contract)
    made = dfq.quantize(model, images, scheme="w4a8", budget="1.4KB")
    final = made.quantized
    weighted = [name for name, slots in final.model.params.items() if "kernel" in slots]
    stems = tuple(f"{name}.{slot}" for name in weighted for slot in ("kernel", "bias"))
    stored = [i for i in quantized_onnx(final).graph.initializer if i.name.startswith(stems)]
    size = sum(len(i.raw_data) for i in stored)
    assert made.mixed is not None
    assert made.mixed.chosen.cost == cost_of(final.model, final.plan, "bytes")
    assert made.mixed.chosen.cost.amount == size
    assert size <= 1400
