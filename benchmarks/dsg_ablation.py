"""The ablation of DSG: what each of its parts is worth, with the quantizer of its paper.

ResNet-20, every layer at W4A4 (`zsq_all_low`), ranges of kernels and activations between their
extremes. Two ways to take the extremes of activations: over all images, and of each image, averaged
over the images, as the released code does. Every row uses the same start, optimizer, batch and
steps; only the terms differ.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import common
import image_measures
import synthesis_quality
from common import Column, Row

LAYERS, SCHEME = "zsq_all_low", "w4a4"
COLUMNS = [
    Column("images", "images"),
    Column("n", "n"),
    Column("seeds", "seeds"),
    Column("bn_loss", "BN loss", ".3f"),
    Column("spread", "spread", ".3f"),
    Column("cosine", "cosine", ".2f"),
    Column("overall", "extremes of all %", ".2fx100"),
    Column("overall_std", "+-", ".2fx100"),
    Column("overall_kl", "KL", ".3f"),
    Column("averaged", "averaged extremes %", ".2fx100"),
    Column("averaged_std", "+-", ".2fx100"),
    Column("averaged_kl", "KL", ".3f"),
    Column("width", "ranges/real", ".2f"),
]


def main() -> None:
    """One row a variant, the mean over seeds."""
    args = arguments()
    reason = synthesis_quality.NETWORKS["resnet20"].absent(args.shared)
    rows: list[Row] = []
    if reason is None:
        subject = synthesis_quality.Subject("resnet20", args)
        for name, images in variants(args).items():
            rows.append(row(subject, name, images, args))
            common.logged(rows[-1], COLUMNS)
    common.finish(args, {"dsg_ablation": COLUMNS}, rows, reason)


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--n", type=int, default=114, help="images: six of each batch norm")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    return parser.parse_args()


Make = Callable[[Any, int], Any]
"""(subject, seed) -> normalised images."""


def variants(args: argparse.Namespace) -> dict[str, Make]:
    """The rows, in the order the paper's accuracy rises."""
    import jax

    from dfq_jax.recipes.dsg import dsg
    from dfq_jax.synthesis.run.engine import synthesize_images

    def drawn(**parts: Any) -> Make:
        recipe = dsg(steps=args.steps, batch=args.n, **parts)
        run = lambda s, seed: synthesize_images(s.model, recipe, args.n, jax.random.key(seed))
        return lambda s, seed: run(s, seed).images

    def noise(subject: Any, seed: int) -> Any:
        return jax.random.normal(jax.random.key(seed), (args.n, *subject.model.contract.shape))

    return {
        "Gaussian noise": noise,
        "ZeroQ": drawn(slack=False, enhance=False, inhibit=0),
        "+ LSE": drawn(slack=False, inhibit=0),
        "+ SDA": drawn(enhance=False, inhibit=0),
        "+ SDA + LSE": drawn(inhibit=0),
        "+ SDA + LSE + SCI": drawn(inhibit=0.01),
        "real": lambda s, seed: synthesis_quality.real_images(s, args.n, seed),
    }


def row(subject: Any, name: str, images: Make, args: argparse.Namespace) -> Row:
    """A variant, averaged over seeds."""
    import numpy as np

    found = [judged(subject, images(subject, seed)) for seed in args.seeds]
    mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    spread = {f"{key}_std": float(np.std([f[key] for f in found])) for key in QUANTIZERS}
    about = {"table": "dsg_ablation", "images": name, "n": args.n, "seeds": len(args.seeds)}
    return {**about, **mean, **spread}


def judged(subject: Any, images: Any) -> dict[str, float]:
    """What images look like to the network, and what quantizers make of them."""
    import jax.numpy as jnp

    images = jnp.asarray(images)
    found = image_measures.looks(subject.model, subject.targets, images)
    kept = {key: found[key] for key in ("bn_loss", "spread", "cosine")}
    for key, fit in QUANTIZERS.items():
        kept[key], kept[f"{key}_kl"] = synthesis_quality.judgement(subject, fit(subject, images))
    return {**kept, "width": width(subject, images)}


def overall(subject: Any, images: Any) -> Any:
    """Ranges between the extremes over all images."""
    from dfq_jax.quantization.calibrate import calibrate

    reference, plan = prepared(subject)
    return calibrate(reference, plan, images)


def averaged(subject: Any, images: Any) -> Any:
    """Ranges between the extremes of an image, averaged over the images."""
    from dfq_jax.quantization.calibrate import calibrate

    reference, plan = prepared(subject)
    return calibrate(reference, plan, None, expected=mean_extremes(reference, plan, images))


QUANTIZERS: dict[str, Callable[[Any, Any], Any]] = {"overall": overall, "averaged": averaged}


def mean_extremes(reference: Any, plan: Any, images: Any) -> dict[str, tuple[Any, Any]]:
    """{tensor: (smallest, largest) value of an image, averaged over the images}."""
    import jax
    import jax.numpy as jnp

    from dfq_jax.quantization.calibrate import capture

    @jax.jit
    def extremes(model: Any, x: Any) -> dict[str, tuple[Any, Any]]:
        axes = lambda v: tuple(range(1, v.ndim))
        seen = capture(model, plan, x)
        return {
            t: (jnp.min(v, axes(v)).mean(), jnp.max(v, axes(v)).mean()) for t, v in seen.items()
        }

    return extremes(reference, images)


def prepared(subject: Any) -> tuple[Any, Any]:
    """The folded network, and a plan of extremes everywhere."""
    import jax

    from dfq_jax.numerics.ranges import MinMax
    from dfq_jax.passes.fold import fold_batch_norm
    from dfq_jax.quantization.plan import parse_scheme, resolve

    if "prepared" not in subject.programs:
        reference = jax.jit(fold_batch_norm)(subject.model)
        plan = resolve(reference.graph, parse_scheme(SCHEME), LAYERS, ())
        extremes = lambda spec: dataclasses.replace(spec, observer=MinMax())
        plan = dataclasses.replace(plan, entries=tuple((s, extremes(e)) for s, e in plan.entries))
        subject.programs["prepared"] = reference, plan
    return subject.programs["prepared"]


def width(subject: Any, images: Any) -> float:
    """Width of the averaged ranges, as a share of those of real images; mean over tensors."""
    import jax.numpy as jnp
    import numpy as np

    reference, plan = prepared(subject)
    if "real ranges" not in subject.programs:
        real = jnp.asarray(synthesis_quality.real_images(subject, len(images), 99))
        subject.programs["real ranges"] = mean_extremes(reference, plan, real)
    wide = lambda ranges: np.array([float(hi - lo) for lo, hi in ranges.values()])
    real = wide(subject.programs["real ranges"])
    return float(np.mean(wide(mean_extremes(reference, plan, images)) / real))


if __name__ == "__main__":
    main()
