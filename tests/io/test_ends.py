"""Networks of PyTorch that choose a class in the end return their scores."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedOpError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.frontends.graph_files import load_module

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.torch


class Choosing(nn.Module):
    def __init__(self, choose: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.choose = nn.Conv2d(3, 5, 1), choose

    def forward(self, x: Any) -> Any:
        return self.choose(self.scores(x))


CHOICES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda y: y.argmax(1),
    "kept": lambda y: y.argmax(dim=1, keepdim=True),
    "cast": lambda y: torch.argmax(y, -3).to(torch.int32).unsqueeze(1),
    "max": lambda y: torch.max(y, 1)[1],
}


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_scores_take_the_place_of_the_largest(name):
    module = Choosing(CHOICES[name])
    model, notes = load_module(module, (3, 4, 6))
    assert any("is the ArgMax of" in note and "take the largest yourself" in note for note in notes)
    x = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype(np.float32)
    (found,) = evaluate(model, jnp.asarray(x))[0]
    with torch.no_grad():
        wanted = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_array_equal(np.asarray(found).argmax(-1).reshape(-1), wanted.reshape(-1))


@pytest.mark.parametrize("choose", [lambda y: y.argmax(1) + y.mean(1), lambda y: y.argmax()])
def test_places_that_are_read_or_of_no_axis_are_refused(choose):
    with pytest.raises(UnsupportedOpError, match=r"aten\.argmax"):
        load_module(Choosing(choose), (3, 4, 6))


def test_the_largest_itself_stays():
    model, notes = load_module(Choosing(lambda y: torch.max(y, 1)[0]), (3, 4, 6))
    assert not any("ArgMax" in note for note in notes)
    assert evaluate(model, jnp.ones((1, 4, 6, 3)))[0][0].shape == (1, 4, 6)
