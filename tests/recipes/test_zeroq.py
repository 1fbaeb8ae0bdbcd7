import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.steps import Now
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.objectives import Context, build_objective
from dfq_jax.synthesis.sources.pixels import gaussian, nearly_black
from dfq_jax.synthesis.terms.match import EPS
from dfq_jax.synthesis.terms.targets import Target, batch_norm_targets, observe

KEY = jax.random.key(0)
NOW = Now(KEY, jnp.zeros((), jnp.int32))


def objective_of(recipe, model, targets):
    """Loss and its gradient with respect to the images, compiled."""
    objective = build_objective(recipe)
    context = Context(model, targets, (), ())
    loss = lambda x: objective(x, context, NOW)[0]
    return jax.jit(jax.value_and_grad(loss))


def to_torch(torch, model, x):
    """The network in PyTorch; returns the inputs of its batch norms as well."""
    F = torch.nn.functional
    env, seen = {"images": x}, {}
    for node in model.graph.nodes:
        p = {k: torch.tensor(np.asarray(v)) for k, v in model.params.get(node.name, {}).items()}
        a = [env[i] for i in node.inputs]
        op = node.op
        match type(op).__name__:
            case "Conv2d":
                kernel = p["kernel"].permute(3, 2, 0, 1)
                pads = tuple(low for low, _ in op.padding)
                out = F.conv2d(a[0], kernel, p.get("bias"), op.strides, pads, 1, op.groups)
            case "BatchNorm":
                seen[node.name] = a[0]
                out = F.batch_norm(a[0], p["mean"], p["var"], p["scale"], p["bias"], eps=op.eps)
            case "Relu":
                out = F.relu6(a[0]) if op.ceiling else F.relu(a[0])
            case "Add":
                out = a[0] + a[1]
            case "MaxPool":
                out = F.max_pool2d(a[0], op.window, op.strides)
            case "GlobalAvgPool":
                out = a[0].mean((2, 3))
            case _:
                out = a[0] @ p["kernel"] + p["bias"]
        env[node.name] = out
    return seen


@pytest.mark.torch
def test_loss_and_gradient_match_torch(tiny_net, nets):
    torch = pytest.importorskip("torch")
    x = np.asarray(nets.images(tiny_net, 3)) * 0.7 + 0.1
    t = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    total = torch.zeros(())
    wanted = [("images", t, torch.zeros(3), torch.ones(3))]
    for name, value in to_torch(torch, tiny_net, t).items():
        bn = tiny_net.params[name]
        mean, var = (torch.tensor(np.asarray(bn[k])) for k in ("mean", "var"))
        wanted.append((name, value, mean, torch.sqrt(var + 1e-6)))
    for _, value, mean, std in wanted:
        flat = value.reshape(*value.shape[:2], -1)
        spread = torch.sqrt(flat.var(2) + 1e-6)
        total = total + ((flat.mean(2) - mean).norm() ** 2 + (spread - std).norm() ** 2) / 3
    total.backward()
    targets, _ = batch_norm_targets(tiny_net)
    loss, slope = objective_of(zeroq(), tiny_net, targets)(jnp.asarray(x))
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    assert t.grad is not None
    theirs = t.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(slope, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def perfect(tiny_net, nets):
    """An image, and targets that are exactly its statistics."""
    x = nets.images(tiny_net, 1)
    x = (x - x.mean((1, 2), keepdims=True)) / jnp.std(x, (1, 2), ddof=1, keepdims=True)
    targets, _ = batch_norm_targets(tiny_net)
    stats = jax.jit(lambda x: observe(tiny_net, targets, x))(x).stats
    exact = {
        k: Target(s.mean[0], s.var[0] * (s.positions / (s.positions - 1)), targets[k].usable)
        for k, s in stats.items()
    }
    return x, exact


def test_no_loss_at_the_targets(perfect, tiny_net):
    x, targets = perfect
    compiled = objective_of(zeroq(), tiny_net, targets)
    loss, _ = compiled(x)
    assert 0 <= float(loss) < 1e-8
    assert float(compiled(x * 1.01)[0]) > 1e-5


def test_copies_of_an_image_cost_what_one_costs(tiny_net, nets):
    targets, _ = batch_norm_targets(tiny_net)
    compiled = objective_of(zeroq(), tiny_net, targets)
    one = nets.images(tiny_net, 1, seed=3)
    alone, _ = compiled(one)
    copies, _ = compiled(jnp.tile(one, (4, 1, 1, 1)))
    assert float(copies) == pytest.approx(float(alone), rel=1e-5)


def test_gradient_by_finite_differences(nets):
    model = nets.stem()
    targets, _ = batch_norm_targets(model)
    compiled = objective_of(zeroq(), model, targets)
    x, direction = nets.images(model, 2), nets.images(model, 2, seed=1)
    slope = float(jnp.sum(compiled(x)[1] * direction))
    h = 1e-2
    low, high = (float(compiled(x + s * h * direction)[0]) for s in (-1, 1))
    assert (high - low) / (2 * h) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("dark", [True, False])
def test_images_match_the_statistics(dark, nets):
    """The loss falls more than tenfold, far below that of noise."""
    model = nets.stem(seed=1)
    seen = []
    made = synthesize_images(
        model,
        zeroq(steps=80, batch=4, dark_start=dark),
        4,
        KEY,
        chunk=1,
        watch=Watcher(progress=seen.append),
    )
    assert made.losses[0] == pytest.approx(seen[-1].parts["loss"], rel=1e-5)
    assert seen[-1].parts["loss"] < seen[0].parts["loss"] / 10
    noise = objective_of(zeroq(), model, batch_norm_targets(model)[0])(nets.images(model, 4))[0]
    assert made.losses[0] < float(noise) / 4
    assert {"BNS", "image"} < set(seen[0].parts)


def test_settings(tiny_net):
    recipe = zeroq(steps=7, batch=3, learning_rate=0.25, dark_start=False)
    assert (recipe.name, recipe.steps, recipe.batch) == ("zeroq", 7, 3)
    assert recipe.settings == {"learning_rate": 0.25, "dark_start": False}
    assert recipe.source.init is gaussian
    assert zeroq().source.init is nearly_black
    assert not recipe.per_layer
    assert [t.weight for t in recipe.terms] == [1, 1]
    assert EPS == 1e-6


def test_rate_falls_to_the_floor_and_halves_after_divergence():
    """Adam's first step has the size of the learning rate; plateaus cut it to 1e-4 at least."""
    params, slope = jnp.zeros(()), jnp.ones(())
    for factor in (1.0, 0.5):
        rule = optax.with_extra_args_support(zeroq(learning_rate=0.5).stages[0].optimizer(factor))
        state = rule.init(params)
        step = jax.jit(lambda state, rule=rule: rule.update(slope, state, params, value=slope))
        with jax.numpy_dtype_promotion("standard"):
            sizes = []
            for _ in range(520):
                update, state = step(state)
                sizes.append(-float(update))
        wanted = [max(0.5 * factor * 0.1 ** (max(i - 1, 0) // 101), 1e-4) for i in range(520)]
        np.testing.assert_allclose(sizes, wanted, rtol=1e-3)
