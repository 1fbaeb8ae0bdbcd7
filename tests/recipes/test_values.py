"""Methods are values: factories make equal ones of equal arguments, and others of others."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.recipes.deepinversion import deepinversion, deepinversion_cifar
from dfq_jax.recipes.end_to_end import end_to_end
from dfq_jax.recipes.fdda import fdda
from dfq_jax.recipes.presets import OFFERS
from dfq_jax.recipes.reconstructions import LEARNED
from dfq_jax.synthesis.terms.centres import Centre, ClassCentres
from dfq_jax.values import described, fingerprint

OTHER: dict[str, dict[str, Any]] = {
    "best": {"start": "pink", "coarse": 0.5},
    "dsg": {"variant": "code"},
    "mct": {"variant": "code", "output": 1e-3, "margin": 8},
    "knowledge_within": {"scheme": "both"},
    "deepinversion": {"resolution": "full", "variant": "code", "student": None},
    "rounding brecq": {"edge_steps": 7},
    "intraq": {"lower": 0.1},
}
"""Other values of arguments that are no numbers, or would not matter."""
WITH: dict[str, dict[str, Any]] = {"knowledge_within": {"scheme": "both"}}
"""Arguments with which all the others matter."""


def centres() -> ClassCentres:
    some = {"bn": Centre(jnp.ones((3, 2)), jnp.ones((3, 2)))}
    return ClassCentres(some, jnp.array([True] * 3), jnp.array([True, False, True]))


FACTORIES = {
    **{name: offer.make for name, offer in OFFERS.items()},
    **{f"rounding {name}": factory for name, factory in LEARNED.items()},
    "deepinversion_cifar": deepinversion_cifar,
    "end_to_end": end_to_end,
    "fdda": lambda **given: fdda(centres(), **given),
}


def others(name: str, default: Any) -> Any:
    """Another value of an argument."""
    match default:
        case bool():
            return not default
        case int() | float():
            return default / 2 if isinstance(default, float) and default else default + 1
        case tuple():
            each = [others(name, v) for v in default]
            return type(default)(*each) if hasattr(default, "_fields") else tuple(each)
        case _:
            return None


def changes(name: str):
    """Calls that differ from the plain one in an argument."""
    factory, given = FACTORIES[name], {}
    while isinstance(factory, functools.partial):
        given, factory = {**given, **factory.keywords}, factory.func
    factory = fdda if name == "fdda" else factory
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = given.get(parameter.name, parameter.default)
            other = OTHER.get(name.removesuffix("_unlabelled"), {}).get(parameter.name)
            other = others(parameter.name, default) if other is None else other
            if other is not None:
                yield {parameter.name: other}


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_equal_factories_make_equal_values(name):
    factory, basis = FACTORIES[name], WITH.get(name, {})
    one, same = factory(**basis), factory(**basis)
    assert one == same
    assert hash(one) == hash(same)
    assert fingerprint(one) == fingerprint(same)
    seen = {fingerprint(factory()), fingerprint(one)}
    for change in changes(name):
        other = factory(**(basis | change))
        if change.items() <= basis.items():
            continue
        assert other != one, change
        assert fingerprint(other) not in seen, change
        seen.add(fingerprint(other))
    assert len(seen) > 2 or name == "noise"


def test_a_student_is_told_by_its_weights(nets):
    of = lambda seed: deepinversion(student=nets.tiny(seed))
    assert of(0) == of(0)
    assert fingerprint(of(0)) == fingerprint(of(0))
    assert fingerprint(of(0)) not in (fingerprint(of(1)), fingerprint(deepinversion()))


def test_centres_are_told_by_what_they_are():
    moved = centres()._replace(right=jnp.array([True, True, True]))
    assert fdda(centres()) != fdda(moved)
    shifted = centres()._replace(centres=jax.tree.map(lambda v: v + 1, centres().centres))
    assert fingerprint(fdda(centres())) != fingerprint(fdda(shifted))


def test_descriptions_do_not_depend_on_the_process():
    """No address, no order of a set: what is on disk is compared with it a week later."""
    text = str(described(LEARNED["qdrop"]())) + str(described(OFFERS["mct"].make()))
    assert " at 0x" not in text
    assert np.array_equal(text.count("dfq_jax.numerics.rounding:with_soft_bits"), 1)
