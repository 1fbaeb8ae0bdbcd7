"""Batch norms of JAX whose parameters are named: any arithmetic, the right statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_nets import noise

import dfq_jax as dfq
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.io.frontends.jax_networks import load_network

SHAPE = (8, 8, 3)
RNG = np.random.default_rng(3)
EPS = 1e-3


def vector(low, high, size=4):
    return jnp.asarray(RNG.uniform(low, high, size), jnp.float32)


def layer(cin):
    return {
        "w": jnp.asarray(RNG.normal(size=(3, 3, cin, 4)) * 0.3, jnp.float32),
        "mu": vector(-0.5, 0.5),
        "sigma": vector(0.5, 1.5),
        "gamma": vector(0.5, 1.5),
        "beta": vector(-0.5, 0.5),
    }


PARAMS = {"first": layer(3), "second": layer(4)}
NAMES = {"mean": "mu", "std": "sigma", "scale": "gamma", "bias": "beta"}


def by_deviation(x, p):
    """A running deviation in place of a variance."""
    return (x - p["mu"]) / (p["sigma"] + EPS) * p["gamma"] + p["beta"]


def by_square(x, p):
    """The root of a square, folded into scale, and shifts gathered."""
    inverse = p["gamma"] * jax.lax.rsqrt(jnp.square(p["sigma"]) + EPS)
    return x * inverse + (p["beta"] - p["mu"] * inverse)


def turned_round(x, p):
    """Shifted first, with the sign the other way round."""
    return p["beta"] - (p["mu"] - x) * jnp.exp(-jnp.log(p["sigma"])) * p["gamma"]


def half(x, p):
    """With numbers in between."""
    return ((x - p["mu"]) * 2.0 / p["sigma"] * p["gamma"] * 0.5 + p["beta"]).astype(jnp.float32)


FORMS = (by_deviation, by_square, turned_round, half)


def network(form, first=False):
    order = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")

    def wide(p):
        spread = lambda k, v: v.transpose(3, 2, 0, 1) if k == "w" else v[:, None, None]
        return {k: spread(k, v) for k, v in p.items()} if first else p

    def run(params, x):
        for name in ("first", "second"):
            p = wide(params[name])
            x = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=order)
            x = jnp.maximum(form(x, p), 0)
        return x.mean((2, 3) if first else (1, 2))

    return run


def norms(model):
    """What batch norms hold, in order."""
    return [model.params[n.name] for n in model.graph.nodes if isinstance(n.op, BatchNorm)]


def loaded(form, names=None, params=None, first=False):
    shape = (3, 8, 8) if first else SHAPE
    return load_network(network(form, first), params or PARAMS, shape, batch_norms=names or NAMES)[
        0
    ]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_any_arithmetic(form, first):
    """Computes the same; the check against the function runs inside."""
    model = loaded(form, first=first)
    for slots, p in zip(norms(model), PARAMS.values(), strict=True):
        np.testing.assert_array_equal(slots["mean"], p["mu"])
        np.testing.assert_allclose(slots["var"], np.square(p["sigma"]), rtol=1e-6)
    x = noise(2, *SHAPE)
    fed = x.transpose(0, 3, 1, 2) if first else x
    expected = np.asarray(network(form, first)(PARAMS, fed))
    np.testing.assert_allclose(dfq.predict(model, x), expected, atol=1e-5)


def test_without_names_the_statistics_are_folded_away():
    assert not norms(load_network(network(by_deviation), PARAMS, SHAPE)[0])


def test_paths_with_a_star_and_other_spreads():
    split = {
        "weights": {n: {k: p[k] for k in ("w", "gamma", "beta")} for n, p in PARAMS.items()},
        "state": {n: {"mean": p["mu"], "rstd": 1 / p["sigma"]} for n, p in PARAMS.items()},
    }

    def run(params, x):
        joined = {
            n: {**params["weights"][n], "mu": s["mean"], "sigma": 1 / s["rstd"]}
            for n, s in params["state"].items()
        }
        return network(by_deviation)(joined, x)

    names = {"mean": "state.*.mean", "inv_std": "state.*.rstd", "scale": "weights.*.gamma"}
    names["bias"] = "weights.*.beta"
    model, _ = load_network(run, split, SHAPE, batch_norms=names)
    found = norms(model)[1]["var"]
    np.testing.assert_allclose(found, np.square(PARAMS["second"]["sigma"]), rtol=1e-6)


def test_what_is_not_named_stays_outside():
    """Scale and bias go on as a layer of their own."""
    model = loaded(by_deviation, {"mean": "mu", "std": "sigma"})
    assert len(norms(model)) == 2
    np.testing.assert_allclose(norms(model)[0]["bias"], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"std": "sigma"}, "told by their mean and one of var, std, inv_std; named are std"),
        ({"mean": "mu"}, "named are mean"),
        ({"mean": "mu", "std": "sigma", "var": "v"}, "one of var, std, inv_std"),
        ({"mean": "mu", "deviation": "sigma"}, "role of a parameter"),
        ({"mean": "moving", "std": "sigma"}, "no parameter is called 'moving'.*there are first"),
        ({"mean": "mu", "std": "s"}, "no parameter in 'first' is called 's'"),
    ],
)
def test_names_that_fit_nothing(names, message):
    with pytest.raises(UsageError, match=message):
        loaded(by_deviation, names)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, p: (x - p["mu"]) / jnp.abs(x).max() * p["sigma"],
        lambda x, p: (x - p["mu"]) * p["w"][0, 0, 0] / p["sigma"],
    ],
)
def test_parameters_that_are_used_otherwise(form):
    with pytest.raises(UnsupportedModelError, match=r"`batch_norms=` names .* of 'first'"):
        loaded(form)


def test_the_library_takes_them(tmp_path):
    model = dfq.load(network(by_deviation), PARAMS, SHAPE, batch_norms=NAMES)
    assert len(norms(model)) == 2
    file = tmp_path / "net.onnx"
    dfq.export(model, file)
    with pytest.raises(UsageError, match="names of batch norms are for networks of JAX"):
        dfq.load(file, batch_norms=NAMES)
