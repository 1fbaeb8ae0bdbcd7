"""Calibrated networks, each made once."""

from collections.abc import Callable
from typing import Any

import pytest

from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantize.calibrate import calibrate
from dfq_jax.quantize.plan import LayerPreset, Rule, parse_scheme, resolve
from dfq_jax.quantize.simulate import QuantizedModel


@pytest.fixture(scope="session")
def calibrated(nets: Any) -> Callable[..., QuantizedModel]:
    """Folds and calibrates `nets.tiny` or another; `floats` names a layer to leave alone."""
    made: dict[tuple[str, ...], QuantizedModel] = {}

    def find(
        scheme: str, layers: LayerPreset = "qdrop_8bit_ends", floats: str = "", net: str = "tiny"
    ) -> QuantizedModel:
        wanted = (scheme, layers, floats, net)
        if wanted not in made:
            model = fold_batch_norm(getattr(nets, net)())
            rules = [Rule(floats, keep_float=True)] if floats else []
            plan = resolve(model.graph, parse_scheme(scheme), layers, rules)
            made[wanted] = calibrate(model, plan, nets.images(model, 4))
        return made[wanted]

    return find
