"""No attribute of an imported operator passes unseen."""

import inspect

import onnx
import pytest

from dfq_jax.io.frontends.onnx_graph import OLDEST_OPSET
from dfq_jax.io.importing.onnx_attributes import HARMLESS, REFUSED, handled
from dfq_jax.io.importing.onnx_table import LOWER

NEWEST = onnx.defs.onnx_opset_version()


def schemas(kind: str) -> list[onnx.defs.OpSchema]:
    """Every version of an operator that a file we accept can mean."""
    versions = {onnx.defs.get_schema(kind, NEWEST, "").since_version}
    for opset in range(OLDEST_OPSET, NEWEST + 1):
        if onnx.defs.has(kind, opset, ""):
            versions.add(onnx.defs.get_schema(kind, opset, "").since_version)
    return [onnx.defs.get_schema(kind, version, "") for version in sorted(versions)]


@pytest.mark.parametrize("kind", sorted(LOWER))
def test_every_attribute_of_the_schema_is_handled_harmless_or_refused(kind):
    function, stated = LOWER[kind], {*HARMLESS.get(kind, ()), *REFUSED.get(kind, {})}
    for schema in schemas(kind):
        unseen = set(schema.attributes) - handled(function) - stated
        assert not unseen, f"{kind} since opset {schema.since_version}: {sorted(unseen)}"
    assert not stated & handled(function)


@pytest.mark.parametrize("kind", sorted(LOWER))
def test_no_function_swallows_attributes(kind):
    kinds = [p.kind for p in inspect.signature(LOWER[kind]).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
