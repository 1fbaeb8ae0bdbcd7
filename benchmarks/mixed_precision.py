"""Mixed precision against uniform bits, judged on labelled images.

Bits are chosen on synthetic images alone (`--method`, or `real` ones), by each sensitivity and
under each budget: what the uniform network takes in average bits, in bytes of its ONNX file or in
bit operations (where tensors are chosen too), and 4.0 bits flat. ONNX has no integers between 4 and
8 bits and none below 4, so at the bytes of uniform W4 nothing is left to choose. `predicted` is the
sum of sensitivities in nats, `KL` the divergence on the labelled images. Every network is quantized
by `recipes.dfq` with the images.
"""

import argparse
import time
from typing import Any

import common
import synthesis_quality
from common import Column, Row

BUDGETS = ("bits", "4.0bits", "bytes", "bops")
SENSITIVITIES = ("kl", "fisher", "trace")
COLUMNS = [
    Column("network", "network"),
    Column("scheme", "uniform"),
    Column("layers", "layers preset"),
    Column("seed", "seed"),
    Column("budget", "budget"),
    Column("sensitivity", "sensitivity"),
    Column("bits", "bits", ".2f"),
    Column("bytes", "KB", ".1f"),
    Column("bops", "GBOPs", ".3f"),
    Column("predicted", "predicted", ".4f"),
    Column("kl", "KL", ".4f"),
    Column("top1", "top-1 %", ".2fx100"),
    Column("seconds", "s", ".1f"),
]


def main() -> None:
    """Rows of uniform and of mixed networks."""
    args = arguments()
    each = lambda s: (found for seed in args.seeds for found in compared(s, seed, args))
    rows, reason = synthesis_quality.measured(args, COLUMNS, each)
    common.finish(args, {args.table: COLUMNS}, rows, reason)


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--networks", type=common.choices(synthesis_quality.SETTINGS), default=("resnet20",)
    )
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    parser.add_argument("--scheme", default="w4a8", help="the uniform network")
    parser.add_argument("--budgets", type=common.choices(BUDGETS), default=BUDGETS[:3])
    parser.add_argument(
        "--sensitivities", type=common.choices(SENSITIVITIES), default=SENSITIVITIES
    )
    parser.add_argument("--layers", default="qdrop_8bit_ends", help="which stay at 8 bits")
    parser.add_argument("--method", default="best", help="of synthesis, or `real`")
    parser.add_argument("--n", type=int, default=128, help="images")
    parser.add_argument("--steps", type=int, help="of synthesis (default: as published)")
    parser.add_argument("--table", default="mixed_precision", help="name of the table")
    return parser.parse_args()


def compared(subject: Any, seed: int, args: argparse.Namespace) -> list[Row]:
    """The uniform network, and one for each sensitivity and budget."""
    import jax.numpy as jnp

    from dfq_jax.quantization.plan import parse_scheme
    from dfq_jax.recipes.dfq import dfq

    images = jnp.asarray(drawn(subject, seed, args))
    scheme = parse_scheme(args.scheme)
    about: Row = {"table": args.table, "network": subject.name, "seed": seed}
    about |= {"scheme": args.scheme.upper(), "layers": args.layers}
    quantize = lambda rules: dfq(subject.model, images, scheme, layers=args.layers, rules=rules)
    uniform = quantize(())
    rows = [about | {"budget": "uniform"} | judged(subject, uniform)]
    tables = {
        (name, tensors): table(args.layers, uniform.reference, scheme, images, name, tensors, seed)
        for name in args.sensitivities
        for tensors in sorted({budget == "bops" for budget in args.budgets})
    }
    for budget in args.budgets:
        for name in args.sensitivities:
            space, losses, seconds = tables[name, budget == "bops"]
            chosen = allocated(uniform, space, losses, budget)
            rows.append(
                about
                | {"budget": budget, "sensitivity": name, "seconds": seconds}
                | {"predicted": chosen.loss}
                | judged(subject, quantize(chosen.rules))
            )
    return rows


def drawn(subject: Any, seed: int, args: argparse.Namespace) -> Any:
    """The images that bits are chosen on."""
    if args.method == "real":
        return synthesis_quality.real_images(subject, args.n, seed)
    return synthesis_quality.synthesized(subject, args.method, args.n, seed, args.steps).images


def table(
    layers: Any, reference: Any, scheme: Any, images: Any, name: Any, tensors: bool, seed: int
) -> tuple[Any, Any, float]:
    """What can be chosen, its sensitivities, and the seconds they took."""
    import jax

    from dfq_jax.allocation.choices import space_of
    from dfq_jax.allocation.sensitivity import sensitivities
    from dfq_jax.passes.thrifty_ranges import thrifty_ranges

    start = time.perf_counter()
    space = space_of(reference.graph, layers, scheme=scheme, tensors=tensors)
    given = {"expected": thrifty_ranges(reference), "method": name, "key": jax.random.key(seed)}
    losses = sensitivities(reference, space, images, **given)
    return space, losses, time.perf_counter() - start


def allocated(uniform: Any, space: Any, losses: Any, budget: Any) -> Any:
    """The best allocation within what the uniform network takes, or within average bits."""
    from dfq_jax.allocation.allocate import allocate
    from dfq_jax.allocation.costs import cost_of, parse_budget

    flat = budget.endswith("bits") and budget != "bits"
    plan, unit = uniform.quantized.plan, budget
    limit = parse_budget(budget) if flat else cost_of(uniform.reference, plan, unit)
    return allocate(uniform.reference, space, losses, limit)


def judged(subject: Any, made: Any) -> Row:
    """What a quantized network takes, and how it does on labelled images."""
    from dfq_jax.allocation.costs import cost_of

    take = lambda unit: cost_of(made.reference, made.quantized.plan, unit).amount
    top1, kl = synthesis_quality.judgement(subject, made.quantized)
    costs = {"bits": take("bits"), "bytes": take("bytes") / 1e3, "bops": take("bops") / 1e9}
    return {**costs, "top1": top1, "kl": kl}


if __name__ == "__main__":
    main()
