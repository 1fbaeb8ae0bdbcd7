"""One loop of image synthesis in a process of its own: `synthesis_speed.py` starts it and reads it.

ZeroQ's objective on all batch-norm inputs, Adam on the pixels. `ours` is the loop of the library
as it runs; `input` is a PyTorch loop that differentiates with respect to the images only;
`published` also computes the gradients of all weights, as released code does which never freezes
them. Prints one JSON object.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import zoo_networks

LAYOUTS = ("contiguous", "channels_last")


def main() -> None:
    """Times one loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("contender", choices=("ours", "input", "published"))
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    found = ours(args) if args.contender == "ours" else pytorch(args)
    print(json.dumps({**found, "peak_mib": found.get("peak_mib") or resident()}))


def resident() -> float:
    """Most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def torch_module(name: str) -> Any:
    """The network with random weights and statistics, in evaluation mode."""
    import torch

    if name != "resnet20":
        return zoo_networks.network("timm:" + name if name == "efficientnet_lite0" else name)
    torch.manual_seed(0)
    module = cifar_resnet(torch.nn, 3).eval()
    zoo_networks.randomise(module, 0)
    return module


def cifar_resnet(nn: Any, blocks: int) -> Any:
    """A CIFAR ResNet with `blocks` residual blocks in each of three groups."""

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(cout)
            self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(cout)
            self.stride, self.half = stride, (cout - cin) // 2

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            if self.half:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.half, self.half))
            return (x + y).relu()

    layers, width = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for cout, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [
            Block(width if i == 0 else cout, cout, stride if i == 0 else 1) for i in range(blocks)
        ]
        width = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The loop of the library."""
    import jax

    from dfq_jax import load
    from dfq_jax.graph.query import macs
    from dfq_jax.optim.fit import run_chunk, start_state
    from dfq_jax.recipes.zeroq import zeroq
    from dfq_jax.synthesis.run.objectives import Context, job_for
    from dfq_jax.synthesis.run.work import BatchWork
    from dfq_jax.synthesis.terms.targets import Forward, batch_norm_targets

    model = load(torch_module(args.network), example=(3, args.size, args.size))
    targets, _ = batch_norm_targets(model)
    recipe = zeroq(batch=args.batch, steps=args.steps)
    job = job_for(model, BatchWork(recipe, targets, args.batch), Forward(dtype=args.dtype))
    plan, context = job.plans[0], Context(model, targets, (), ())
    step, key = plan.step(job.parts[-1]), jax.random.key(0)
    state = start_state(recipe.source.init(key, job.shape), (), step)
    given = (context, key, step, args.steps)
    start = time.perf_counter()
    compiled = run_chunk.lower(state, *given).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def turn() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, context, key))[0]

    return {
        "compile_s": compile_s,
        "planned_mib": getattr(memory, "temp_size_in_bytes", 0) / 2**20,
        "step_s": fastest(turn) / args.steps,
        "flops": 4 * args.batch * sum(macs(model).values()),
    }


def fastest(turn: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of some rounds, after one to warm up."""
    turn()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        turn()
        times.append(time.perf_counter() - start)
    return min(times)


def pytorch(args: argparse.Namespace) -> dict[str, Any]:
    """A PyTorch loop with hooks on batch norms."""
    import torch

    device = "cuda" if args.device == "gpu" else "cpu"
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    module = torch_module(args.network).to(device=device, memory_format=layout)
    module.requires_grad_(args.contender == "published")
    seen: list[Any] = []
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(args.batch, 3, args.size, args.size, device=device) / 75
    images = images.to(memory_format=layout).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4)
    wanted: list[Any] = [(torch.zeros(3, device=device), torch.ones(3, device=device))]
    for norm in norms:
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        wanted.append((mean, (var + 1e-6).sqrt()))
    cast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step() -> None:
        seen.clear()
        optimizer.zero_grad(set_to_none=True)
        with cast:
            module(images)
        loss = images.new_zeros(())
        for x, (mean, std) in zip((images, *seen), wanted, strict=True):
            flat = x.float().flatten(2)
            spread = (flat.var(2) + 1e-6).sqrt()
            loss = loss + ((flat.mean(2) - mean) ** 2 + (spread - std) ** 2).sum() / len(images)
        loss.backward()
        for p in module.parameters():
            p.grad = None
        optimizer.step()
        plateau.step(loss.item())

    def turn() -> None:
        for _ in range(args.steps):
            step()

    seconds = fastest(turn) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {"compile_s": 0.0, "step_s": seconds, "peak_mib": peak}


if __name__ == "__main__":
    common.log(" ".join(sys.argv[1:]))
    main()
