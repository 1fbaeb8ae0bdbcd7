"""The engine of block reconstruction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import PlanError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.numerics.rounding import adaround, nearest
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantize import reconstruct as engine
from dfq_jax.quantize.calibrate import calibrate
from dfq_jax.quantize.learning import (
    Penalty,
    Phase,
    Rates,
    Reconstruction,
    Seen,
    blended,
    relative_gap,
    squared_gap,
)
from dfq_jax.quantize.plan import Scheme, resolve
from dfq_jax.quantize.reconstruct import MOST_STEPS, Work, chunk_within, fed, reconstruct
from dfq_jax.quantize.simulate import simulate

KEY = jax.random.key(7)
QUICK = Reconstruction(
    "quick",
    adaround(scale=True),
    (Phase(60),),
    rates=Rates(bits=3e-2, scale=1e-3, edges=1e-3),
    penalty=Penalty(0.01),
    loss=relative_gap,
    batch=8,
)


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(reference, nets):
    return np.asarray(nets.images(reference, 24))


@pytest.fixture(scope="module")
def quantized(reference, images):
    plan = resolve(reference.graph, Scheme(2, 8))
    return calibrate(reference, plan, jnp.asarray(images))


@pytest.fixture(scope="module")
def learned(quantized, reference, images):
    return reconstruct(quantized, reference, images, QUICK, KEY)


def same(first, second):
    """Whether all parameters and scales of two networks are equal, bit for bit."""
    pairs = zip(
        *(jax.tree.leaves((q.model.params, q.qparams)) for q in (first, second)), strict=True
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def error(quantized, reference, x):
    """Squared error of the output, relative."""
    wanted = np.asarray(evaluate(reference, jnp.asarray(x))[0][0])
    found = np.asarray(jax.jit(simulate)(quantized, jnp.asarray(x)))
    return np.sum((found - wanted) ** 2) / np.sum(wanted**2)


def test_a_network_gets_better_on_images_it_has_not_seen(learned, quantized, reference, nets):
    found, reports = learned
    assert [r.name for r in reports] == ["conv1", "depthwise +1", "conv2", "fc"]
    assert all(r.after <= r.before for r in reports if r.kept)
    assert sum(r.kept for r in reports) >= 3
    fresh = nets.images(reference, 32, seed=5)
    assert error(found, reference, fresh) < 0.8 * error(quantized, reference, fresh)


def test_kernels_lie_on_their_grids(learned):
    found, _ = learned
    for site, spec in found.plan.entries:
        if site.argument is None:
            kernel = found.model.params[site.node]["kernel"]
            snapped = fake_quantize(kernel, found.qparams[site], spec.grid)
            np.testing.assert_allclose(snapped, kernel, atol=1e-6)


def test_sites_of_a_tensor_still_share_its_grid(learned):
    found, _ = learned
    moved = 0
    for _, sites in found.plan.groups:
        scales = {float(found.qparams[site].scale) for site in sites}
        assert len(scales) == 1
        moved += len(sites)
    assert moved


def test_the_same_key_gives_the_same_bits(learned, quantized, reference, images):
    again, _ = reconstruct(quantized, reference, images, QUICK, KEY)
    assert same(again, learned[0])
    other, _ = reconstruct(quantized, reference, images, QUICK, jax.random.key(8))
    assert not same(other, learned[0])


def test_little_memory_feeds_fewer_steps_and_changes_nothing(learned, quantized, reference, images):
    image = 8 * images[0].nbytes
    found, _ = reconstruct(quantized, reference, images, QUICK, KEY, memory=12 * image)
    assert same(found, learned[0])


def test_chunks_within_memory(images):
    work = Work(None, None, None, {}, images, images, images[:, :4], 0)  # type: ignore[arg-type]
    each = 8 * 4 * (2 * images[0].size + images[0, :4].size)
    for memory, steps in ((0, 1), (each, 1), (3 * each + 1, 3), (10**12, MOST_STEPS)):
        assert chunk_within(work._replace(memory=memory), 8) == steps


def test_batches_depend_on_the_step_only(images):
    work = Work(None, None, None, {}, images, images + 1, images + 2, 0)  # type: ignore[arg-type]
    all_of = fed(work, 8, 3, 0, 6)
    for part in (fed(work, 8, 3, 2, 3), tuple(v[2:5] for v in all_of)):
        for found, wanted in zip(part, all_of, strict=True):
            np.testing.assert_array_equal(found, wanted[2:5])
    np.testing.assert_array_equal(all_of[1], all_of[0] + 1)
    assert fed(work, 30, 3, 0, 1)[0].shape[:2] == (1, 30)  # more than there are


def test_a_unit_that_gets_worse_stays_as_it_was(quantized, reference, images):
    wild = QUICK._replace(rates=Rates(bits=1e3, scale=10.0, edges=10.0), phases=(Phase(6),))
    found, reports = reconstruct(quantized, reference, images, wild, KEY)
    assert not all(r.kept for r in reports)
    assert error(found, reference, images) <= 1.5 * error(quantized, reference, images)
    untouched = [r.name.split()[0] for r in reports if not r.kept]
    for name in untouched:
        old = quantized.model.params[name]["kernel"]
        np.testing.assert_array_equal(found.model.params[name]["kernel"], old)


def test_stopped_anywhere_it_goes_on(learned, quantized, reference, images, tmp_path, monkeypatch):
    """Between units and inside one."""
    calls, real = [], engine.fit

    def stopping(*args, **how):
        calls.append(1)
        if len(calls) == 2:

            def stop(step, metrics):
                if step >= 20:
                    raise KeyboardInterrupt

            return real(*args, **{**how, "chunk": 10}, on_chunk=stop)
        return real(*args, **how)

    monkeypatch.setattr(engine, "fit", stopping)
    given = {"folder": tmp_path, "fingerprint": {"weights": "a"}}
    with pytest.raises(KeyboardInterrupt):
        reconstruct(quantized, reference, images, QUICK, KEY, **given)
    assert [p.name for p in sorted(tmp_path.glob("*.npz"))] == ["unit-0.npz"]
    found, reports = reconstruct(quantized, reference, images, QUICK, KEY, **given)
    assert same(found, learned[0])
    assert len(calls) == 2 + 3  # the first unit was there
    assert [r._replace(seconds=0) for r in reports] == [r._replace(seconds=0) for r in learned[1]]
    with pytest.raises(UsageError, match=r"weights: saved 'a', now 'b'"):
        reconstruct(
            quantized, reference, images, QUICK, KEY, folder=tmp_path, fingerprint={"weights": "b"}
        )
    for name, other in (
        ("key", (images, QUICK, jax.random.key(8))),
        ("method", (images, QUICK._replace(batch=7), KEY)),
        ("images", (images + 1, QUICK, KEY)),
    ):
        with pytest.raises(UsageError, match=f"(?s)holds the state of a different run.*{name}: "):
            reconstruct(quantized, reference, *other, **given)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_files_are_made_again(
    learned, quantized, reference, images, tmp_path, monkeypatch, damage
):
    given = (quantized, reference, images, QUICK, KEY)
    reconstruct(*given, folder=tmp_path)
    file = tmp_path / "unit-1.npz"
    data = bytearray(file.read_bytes())
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "flipped":
            kernel = np.load(file)["kernel/n0"].tobytes()
            data[bytes(data).find(kernel)] ^= 1
        case _:
            data = bytearray((tmp_path / "unit-0.npz").read_bytes())
    file.write_bytes(data)
    calls, real = [], engine.fit
    monkeypatch.setattr(engine, "fit", lambda *a, **k: calls.append(1) or real(*a, **k))
    found, _ = reconstruct(*given, folder=tmp_path)
    assert same(found, learned[0])
    assert len(calls) == 1


def test_without_images(quantized, reference, images):
    with pytest.raises(PlanError, match="needs at least one image"):
        reconstruct(quantized, reference, images[:0], QUICK, KEY)


def test_nothing_to_learn_changes_nothing(quantized, reference, images):
    """Rounding to nearest with activations' scales fixed."""
    idle = Reconstruction("idle", nearest(), (Phase(2, edges=False),), batch=4)
    found, reports = reconstruct(quantized, reference, images, idle, KEY)
    assert all(r.before == pytest.approx(r.after, rel=1e-5) for r in reports)
    assert error(found, reference, images) == pytest.approx(
        error(quantized, reference, images), rel=1e-4
    )


# parts of a method


def test_blends_are_of_both_in_the_share_asked_for():
    first, second = jnp.ones((64, 64)), jnp.zeros((64, 64))
    found = blended(KEY, first, second, 0.25)
    assert set(np.unique(found)) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.25, abs=0.02)
    assert blended(KEY, first, second, 0.0) is second
    assert blended(KEY, first, second, 1.0) is first
    mean = np.mean([blended(k, first, second, 0.5) for k in jax.random.split(KEY, 40)], axis=0)
    assert np.abs(mean - 0.5).max() < 0.4  # no element is always of one


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_the_exponent_falls_after_the_warm_up(curve):
    penalty = Penalty(0.3, curve=curve)
    found = [float(penalty.exponent(jnp.int32(s), 100)) for s in (0, 20, 40, 60, 80, 100)]
    done = np.array([0, 0, 0.25, 0.5, 0.75, 1])
    left = 1 - done if curve == "linear" else (1 + np.cos(np.pi * done)) / 2
    np.testing.assert_allclose(found, 2 + 18 * left, rtol=1e-5)
    factors = [float(penalty.factor(jnp.int32(s), 100)) for s in (0, 19, 20, 99)]
    np.testing.assert_allclose(factors, [0, 0, 0.3, 0.3], rtol=1e-6)


def test_losses_by_hand():
    out, target = jnp.zeros((2, 3, 3, 4)), jnp.full((2, 3, 3, 4), 0.5)
    seen = Seen(out, target, jnp.float32(0.25))
    assert float(squared_gap(seen)) == pytest.approx(4 * 0.25)
    assert float(relative_gap(seen)) == pytest.approx(4.0)
