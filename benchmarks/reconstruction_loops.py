"""The loop of block reconstruction in a process of its own: `reconstruction_speed.py` reads it.

GENIE-M on a CIFAR ResNet, a unit at a time: soft bits and scales of kernels, scales of activations,
half of all activations left in float. `ours` is the engine of the library as it runs; `pytorch` is
a loop over the same units, batch norms not folded, as released code has it. Prints one JSON object:
{unit: seconds a step}, and seconds to compile.
"""

import argparse
import json
import sys
import time
from typing import Any

import common
from synthesis_loops import LAYOUTS, resident, torch_module

IMAGES = 256


def main() -> None:
    """Times one loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=("ours", "pytorch"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    found = ours(args) if args.contender == "ours" else pytorch(args)
    print(json.dumps({**found, "peak_mib": resident()}))


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The engine of the library."""
    import jax
    import numpy as np

    from dfq_jax import load
    from dfq_jax.optim.state import NOWHERE
    from dfq_jax.quantization.plan import parse_scheme
    from dfq_jax.recipes.dfq import dfq
    from dfq_jax.recipes.genie_m import genie_m
    from dfq_jax.reconstruction.engine import passed
    from dfq_jax.reconstruction.phases import in_phases
    from dfq_jax.reconstruction.unit_at_work import UnitAtWork
    from dfq_jax.reconstruction.units import unit_model, unit_qparams, units_of

    model = load(torch_module("resnet20"), example=(3, 32, 32))
    images = jax.random.normal(jax.random.key(0), (IMAGES, 32, 32, 3))
    scheme = parse_scheme("w2a2")
    made = dfq(model, images, scheme, layers="brecq_8bit_ends_second", bias="none")
    method, exact, steps, compile_s = genie_m(steps=args.steps), np.asarray(images), {}, 0.0
    method = method._replace(batch=args.batch)
    for unit in units_of(made.reference.graph, made.quantized.plan):
        float_unit = unit_model(unit, made.reference)
        targets = passed(float_unit, None, None, exact)
        now = (
            unit_model(unit, made.quantized.model),
            unit_qparams(unit, made.quantized.qparams),
        )
        work = UnitAtWork(unit, float_unit, *now, exact, exact, targets, 2**30)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            in_phases(work, method, jax.random.key(0), NOWHERE)
            seconds.append(time.perf_counter() - start)
        steps[unit.title.split(" ")[0].removesuffix(".conv1")] = min(seconds[1:]) / args.steps
        compile_s += seconds[0] - min(seconds[1:])
        exact = targets
    return {"steps": steps, "compile_s": compile_s}


def pytorch(args: argparse.Namespace) -> dict[str, Any]:
    """A PyTorch loop over the same units."""
    import torch
    from reconstruction_torch import reconstruction, switch, units

    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    device = "cuda" if args.device == "gpu" else "cpu"
    placed: Any = {"device": device, "memory_format": layout}
    x = torch.randn(IMAGES, 3, 32, 32).to(**placed)
    steps = {}
    for name, unit in units(torch_module("resnet20")).items():
        unit = unit.to(**placed)
        with torch.no_grad():
            targets = switch(unit, "float")(x)
        run = reconstruction(unit, x, x, targets, args.steps, args.batch)
        for _ in range(5):
            run()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(args.steps):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        steps[name] = min(seconds) / args.steps
        x = targets
    return {"steps": steps, "compile_s": 0.0}


if __name__ == "__main__":
    common.log(" ".join(sys.argv[1:]))
    main()
