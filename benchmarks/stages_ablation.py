"""What each choice of `stages` is worth, judged on photographs that nothing else is judged by.

Every row changes one thing and learns all stages anew. The judges are crops of COCO photographs
without a label: how often the quantized network names the float network's class, the divergence
of its prediction, and the error of its logits. `photographs` learns from other crops instead of
synthetic images: what images could give at most.
"""

import argparse
import io
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import artifacts
import common
import numpy as np
from common import Column, Row

COLUMNS = [
    Column("network", "network"),
    Column("scheme", "scheme"),
    Column("variant", "variant"),
    Column("n", "images"),
    Column("steps", "steps"),
    Column("seed", "seed"),
    Column("agreement", "agreement %", ".1fx100"),
    Column("kl", "KL", ".3f"),
    Column("sqnr", "SQNR dB", ".2f"),
    Column("kept", "stages better"),
    Column("seconds", "s", ".0f"),
]
PHOTOGRAPHS = "models/coco128_val_480.zip"
JUDGES = 64


class Variant(NamedTuple):
    """What a row learns from, and how.

    Attributes:
      method: that makes the images; None for photographs.
      enlarge: (what `stages` has made of images) -> what is made here.
      bits: rate of codes, if another.
      positions: that the output of a stage has whose layers are solved first, if another number.
    """

    method: str | None = "best_unlabelled"
    enlarge: Callable[[Any], Any] = lambda usual: usual
    bits: float | None = None
    positions: int | None = None


def half(usual: Any) -> Any:
    """Images and parts without collages, as often as there are both."""

    def make(images: Any, key: Any) -> Any:
        import jax
        import jax.numpy as jnp

        count = usual.times // 2 * len(images)
        both = (usual.make(images, jax.random.fold_in(key, i))[:count] for i in range(2))
        return jnp.concatenate(list(both))

    return usual._replace(make=make)


VARIANTS = {
    "as it is": Variant(),
    "no collages": Variant(enlarge=half),
    "images alone": Variant(enlarge=lambda usual: None),
    "nothing in closed form": Variant(positions=10**9),
    "the last stage in closed form, too": Variant(positions=0),
    "codes at 0.003": Variant(bits=3e-3),
    "codes at 0.01": Variant(bits=1e-2),
    "some images labelled": Variant("best"),
    "dead leaves and pink noise": Variant("noise"),
    "photographs": Variant(None),
}


def main() -> None:
    """Rows of every variant."""
    parser = common.parser(__doc__)
    large = ("mobilenet_v2", "efficientnet_lite0")
    parser.add_argument("--networks", type=common.choices(large), default=large[:1])
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--variants", type=common.choices(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--layers", default="qdrop_8bit_ends")
    parser.add_argument("--n", type=int, default=64, help="images")
    parser.add_argument("--steps", type=int, default=200, help="of each stage")
    parser.add_argument("--image-steps", type=int, default=60, help="of synthesis")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    there, reason = artifacts.present(args.shared, args.networks)
    reason = common.absent(args.shared, PHOTOGRAPHS) or reason
    rows = [] if reason else [row for name in there for row in rows_of(name, args)]
    common.finish(args, {"stages_ablation": COLUMNS}, rows, reason)


def rows_of(network: str, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one network."""
    import dfq_jax

    about = artifacts.NETWORKS[network]
    model = dfq_jax.load(about.model, arch=about.arch)
    shots = photographs(args.shared / PHOTOGRAPHS, model.contract)
    for name in args.variants:
        variant = VARIANTS[name]
        seen = shots[JUDGES : JUDGES + args.n]
        if variant.method is not None:
            given = {"method": variant.method, "key": args.seed, "steps": args.image_steps}
            seen = dfq_jax.synthesize(model, n=args.n, **given).images
        row = measured(model, seen, variant, shots[:JUDGES], args)
        row |= {"table": "stages_ablation", "network": network, "variant": name, "n": len(seen)}
        common.logged(row, COLUMNS)
        yield row


def measured(model: Any, images: Any, variant: Variant, judges: Any, args: Any) -> Row:
    """One variant."""
    import jax
    import jax.numpy as jnp

    from dfq_jax.quantization.plan import WIDE, parse_scheme
    from dfq_jax.recipes.dfq import at_one_width, dfq
    from dfq_jax.recipes.presets import FEW_BITS
    from dfq_jax.recipes.reconstructions import enlarges, reconstructed
    from dfq_jax.recipes.stages import stages

    start, method = time.monotonic(), stages(steps=args.steps)
    if variant.bits is not None:
        method = method._replace(rates=method.rates._replace(bits=variant.bits))
    if variant.positions is not None:
        method = method._replace(start_positions=variant.positions)
    enlarge, images = variant.enlarge(enlarges("stages", model.contract)), jnp.asarray(images)
    scheme = parse_scheme(args.scheme)
    make = partial(dfq, model, images, scheme, layers=args.layers, bias="none")
    made = make()
    if (scheme.activation_bits or WIDE) < FEW_BITS:
        made, _ = at_one_width(made, images, make)
    key = jax.random.key(args.seed)
    made, reports = reconstructed(made, images, (method,), key, enlarge=enlarge)
    kept = f"{sum(report.kept for report in reports)} of {len(reports)}"
    row = {"scheme": args.scheme, "steps": args.steps, "seed": args.seed, "kept": kept}
    return row | judged(made, judges) | {"seconds": time.monotonic() - start}


def judged(made: Any, judges: np.ndarray) -> Row:
    """Agreement, divergence and error of logits against the float network."""
    import jax
    import jax.numpy as jnp

    from dfq_jax.graph.evaluate import evaluate
    from dfq_jax.numerics.softmax import divergences
    from dfq_jax.quantization.simulate import simulate

    pieces = [jnp.asarray(judges[i : i + 16]) for i in range(0, len(judges), 16)]
    exact = jax.jit(lambda x: evaluate(made.reference, x)[0][0])
    rough = jax.jit(partial(simulate, made.quantized))
    wanted, found = (jnp.concatenate([run(x) for x in pieces]) for run in (exact, rough))
    centred = lambda x: x - jnp.mean(x, axis=-1, keepdims=True)
    signal, error = jnp.sum(centred(wanted) ** 2), jnp.sum(centred(wanted - found) ** 2)
    return {
        "agreement": float(jnp.mean(jnp.argmax(wanted, -1) == jnp.argmax(found, -1))),
        "kl": float(jnp.mean(divergences(wanted, found))),
        "sqnr": float(10 * jnp.log10(signal / error)),
    }


def photographs(path: Any, contract: Any) -> np.ndarray:
    """Centre crops of all pictures of an archive, in the order of their names."""
    import PIL.Image

    from dfq_jax.data.preprocess import preprocess

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        opened = (PIL.Image.open(io.BytesIO(archive.read(name))) for name in names)
        return np.stack([preprocess(image, contract) for image in opened])


if __name__ == "__main__":
    main()
