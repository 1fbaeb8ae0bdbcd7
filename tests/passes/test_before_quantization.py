from typing import Any

import jax
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.ops import Relu
from dfq_jax.passes.absorb import absorb_high_biases
from dfq_jax.passes.before_quantization import Surgery, operated, replaced_relu6
from dfq_jax.passes.equalize import equalize_cross_layer, uncapped
from dfq_jax.passes.fold import fold_batch_norm


def same(a, b):
    return a.graph == b.graph and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize(
    ("surgery", "passes"),
    [
        (Surgery(), [equalize_cross_layer]),
        (Surgery(None), []),
        (Surgery(None, relu6="replace"), []),
        (Surgery("groups"), [lambda m: equalize_cross_layer(m, reach="groups")]),
        (
            Surgery("pairs", "replace"),
            [lambda m: uncapped(m, ["relu2"]), equalize_cross_layer],
        ),
        (Surgery(absorb=True), [equalize_cross_layer, absorb_high_biases]),
    ],
)
def test_a_surgery_is_its_passes_in_order(surgery, passes, tiny_net):
    wanted = fold_batch_norm(tiny_net)
    for one in passes:
        wanted = one(wanted)
    found = operated(tiny_net, surgery)
    assert same(found, wanted)
    assert replaced_relu6(tiny_net, found) == (
        ("relu2",) if surgery.relu6 == "replace" and passes else ()
    )


def test_replacing_makes_pairs_of_what_a_ceiling_kept_apart(tiny_net):
    kept, replaced = (operated(tiny_net, Surgery(relu6=how)) for how in ("keep", "replace"))
    kernel = lambda m: np.asarray(m.params["depthwise"]["kernel"])
    assert not np.allclose(kernel(kept), kernel(replaced), rtol=1e-2)
    assert kept.graph["relu2"].op == Relu(6.0)
    assert replaced.graph["relu2"].op == Relu()


def test_distrusted_statistics_are_not_recorded(tiny_net):
    found = operated(tiny_net, Surgery(), distrusted=frozenset({"bn1"}))
    assert set(found.moments) == {"depthwise", "project", "conv2"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"reach": "group"},
            "reach of equalization 'group' is none of pairs, groups; nearest: gro",
        ),
        ({"relu6": "remove"}, "relu6 'remove' is none of keep, replace"),
    ],
)
def test_names_that_are_none(wrong, message, tiny_net):
    surgery: Any = Surgery(**wrong)
    with pytest.raises(UsageError, match=message):
        operated(tiny_net, surgery)
