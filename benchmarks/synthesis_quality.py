"""Images of every method, measured the same way and used by one fixed quantizer.

Every method makes the same number of images, in as many steps as fit into the same seconds of all
cores together (`--seconds`), which other work on the machine hardly changes, or as its paper takes
(`--published`); `best-third` has a third of `best`'s steps. The quantizer takes its ranges from the
images alone: L_p grids for each kernel channel and each tensor, biases corrected. Two more rows
stand for the ends of the scale: real images, and Gaussian noise. Accuracy is that of the simulator,
which computes what ONNX Runtime does (see `verify.py`); `KL` is how far the class probabilities on
the same labelled images are from the float network's, in nats.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import artifacts
import common
import image_measures
from artifacts import NETWORKS
from common import Column, Row

SCHEMES = ("w8a8", "w4a8", "w4a4")
NAMES = ("table", "network", "method", "steps")
COLUMNS = [
    Column("network", "network"),
    Column("method", "images"),
    Column("seeds", "seeds"),
    Column("steps", "steps"),
    Column("seconds", "core s", ".0f"),
    Column("bn_loss", "BN loss", ".3f"),
    Column("spread", "spread", ".2f"),
    Column("cosine", "cosine", ".2f"),
    Column("classes", "classes %", ".0fx100"),
    Column("confidence", "confidence %", ".0fx100"),
    *(Column(scheme, scheme.upper() + " %", ".2fx100") for scheme in SCHEMES),
    Column("deviation", "+-", ".2fx100"),
    *(Column(f"{scheme}_kl", f"KL {scheme.upper()}", ".3f") for scheme in SCHEMES),
]
THIRD = "best-third"
ORDER = (
    "real", "best", THIRD, "zeroq", "dsg", "genie", "deepinversion", "knowledge_within", "intraq",
    "clusterq", "mct", "gzsq", "noise", "gaussian",
)  # fmt: skip


class Setting(NamedTuple):
    """A network with how it is judged.

    Attributes:
      layers: which layers stay at 8 bits.
      batch: images optimised together at most.
      grid: images of a preview.
    """

    layers: str
    batch: int
    grid: int


SETTINGS = {
    "resnet20": Setting("qdrop_8bit_ends", 128, 64),
    "efficientnet_lite0": Setting("qdrop_8bit_ends", 16, 16),
}


def main() -> None:
    """Makes, measures and judges the images of the chosen methods."""
    args = arguments()
    ways = [(method, seed) for seed in args.seeds for method in args.methods]
    rows, reason = measured(args, COLUMNS, lambda s: (row(s, *way, args) for way in ways))
    common.finish(args, {args.table: COLUMNS}, averaged(rows), reason)


def measured(
    args: argparse.Namespace,
    columns: list[Column],
    rows_of: "Callable[[Subject], Iterable[Row]]",
) -> tuple[list[Row], str | None]:
    """The rows of every network that is there, told as they come, and which file is missing."""
    rows: list[Row] = []
    networks, reason = artifacts.present(args.shared, args.networks)
    for network in networks:
        for found in rows_of(Subject(network, args)):
            rows.append(found)
            common.logged(found, columns)
    return rows, reason


def averaged(rows: list[Row]) -> list[Row]:
    """One row a network and method: means over seeds, and the deviation of the last accuracy."""
    import numpy as np

    groups: dict[tuple[str, str], list[Row]] = {}
    for found in rows:
        groups.setdefault((found["network"], found["method"]), []).append(found)
    merged = []
    for same in groups.values():
        means = {k: np.mean([r[k] for r in same]).item() for k in same[0] if k not in NAMES}
        lowest = [k for k in SCHEMES if k in same[0]][-1]
        named = {k: same[0].get(k) for k in NAMES}
        spread = np.std([r[lowest] for r in same]).item() if len(same) > 1 else None
        merged.append(named | means | {"seeds": len(same), "deviation": spread})
    return merged


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = common.parser(__doc__)
    parser.add_argument("--networks", type=common.choices(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--methods", type=common.choices(ORDER), default=ORDER)
    parser.add_argument("--schemes", type=common.choices(SCHEMES), default=SCHEMES)
    parser.add_argument("--seeds", type=lambda t: [int(v) for v in common.names(t)], default=[0])
    parser.add_argument("--n", type=int, default=256, help="images")
    parser.add_argument("--seconds", type=float, default=90, help="of all cores, per method")
    parser.add_argument("--published", action="store_true", help="steps of the papers instead")
    parser.add_argument("--steps", type=int, help="of a batch, instead")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    parser.add_argument("--grids", type=Path, help="folder for a PNG of each method's images")
    parser.add_argument("--table", default="synthesis_quality", help="name of the table")
    return parser.parse_args()


class Subject:
    """A network with its targets and labelled images, read once."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        import dfq_jax
        from dfq_jax.synthesis.terms.targets import batch_norm_targets

        about = NETWORKS[name]
        source, arch = (
            (args.shared / about.model, about.arch) if about.arch else (about.model, None)
        )
        self.name, self.setting, self.about = name, SETTINGS[name], about
        self.model = dfq_jax.load(source, arch=arch)
        self.targets, _ = batch_norm_targets(self.model)
        self.judged = labelled(args.shared / about.data, self.model.contract, args.limit)
        self.real_folder = args.shared / about.real
        self.programs: dict[str, Any] = {}


def labelled(path: Path, contract: Any, limit: int | None) -> tuple[Any, Any]:
    """Images as the network wants them, and their classes."""
    import numpy as np

    from dfq_jax.data.accuracy import load_example, pick
    from dfq_jax.data.sources import open_source

    source = open_source(str(path))
    loaded = [load_example(source, i, contract) for i in pick(len(source), limit)]
    return np.stack([x for x, _ in loaded]), np.array([y for _, y in loaded])


def row(subject: Subject, method: str, seed: int, args: argparse.Namespace) -> Row:
    """One method and seed."""
    images, facts = made(subject, method, seed, args)
    measured = image_measures.looks(subject.model, subject.targets, images)
    found: Row = {"table": args.table, "network": subject.name, "method": method, "seeds": 1}
    found |= facts | measured
    for scheme in args.schemes:
        found |= judged_with(subject, images, scheme)
    return found


def made(subject: Subject, method: str, seed: int, args: argparse.Namespace) -> tuple[Any, Row]:
    """The images of a method, with steps and seconds."""
    import jax

    if method == "real":
        return real_images(subject, args.n, seed), {}
    if method == "gaussian":
        key = jax.random.key(seed)
        return jax.random.normal(key, (args.n, *subject.model.contract.shape)), {}
    steps = None if args.published else affordable(subject, method, args)
    start = time.process_time()
    images = synthesized(subject, method, args.n, seed, steps)
    seconds = time.process_time() - start
    if args.grids is not None:
        from dfq_jax.report.grid import grid_png

        args.grids.mkdir(parents=True, exist_ok=True)
        file = args.grids / f"{subject.name}-{method}.png"
        file.write_bytes(grid_png(images, most=subject.setting.grid))
    facts = {"steps": images.provenance["steps"] or None, "seconds": seconds}
    return images.images, facts


def synthesized(subject: Subject, method: str, n: int, seed: int, steps: int | None) -> Any:
    """An `Examples` by the public function."""
    import dfq_jax

    if method == THIRD:
        method, steps = "best", None if steps is None else max(steps // 3, 1)
    batch = None if method in ("noise", "dsg") else subject.setting.batch
    return dfq_jax.synthesize(subject.model, method, n, seed=seed, steps=steps, batch=batch)


def affordable(subject: Subject, method: str, args: argparse.Namespace) -> int | None:
    """Steps that take the seconds allowed: from the difference of a longer and a shorter run."""
    if method == "noise":
        return None
    if args.steps is not None:
        return args.steps
    if method == THIRD:
        return affordable(subject, "best", args)
    if method not in subject.programs:
        once, compiling = [], []
        for steps in (10, 10, 30):  # the first warms up
            start = time.process_time()
            made = synthesized(subject, method, subject.setting.batch, 99, steps)
            once.append(time.process_time() - start)
            compiling.append(made.provenance["compile_seconds"])
        batches = -(-args.n // subject.setting.batch)
        longer = once[2] - once[1] - (compiling[2] - compiling[1])
        per_step = max(longer / 20, 1e-3) * batches
        fixed = max(once[1] - 10 * per_step / batches, 0)
        subject.programs[method] = max(int((args.seconds - fixed) / per_step), 10)
    return subject.programs[method]


def real_images(subject: Subject, n: int, seed: int) -> Any:
    """Images of the training set, or of the sample the network is judged by."""
    import numpy as np

    from dfq_jax.data.accuracy import load_example
    from dfq_jax.data.sources import open_source

    source = open_source(str(subject.real_folder))
    chosen = np.random.default_rng(seed).choice(len(source), n, replace=False)
    return np.stack([load_example(source, int(i), subject.model.contract)[0] for i in chosen])


def judged_with(subject: Subject, images: Any, scheme: str) -> Row:
    """How the network does on labelled images, quantized with these images."""
    import jax.numpy as jnp

    quantized = image_measures.fixed_quantizer(
        subject.model, jnp.asarray(images), scheme, subject.setting.layers
    )
    accuracy, divergence = judgement(subject, quantized)
    return {scheme: accuracy, f"{scheme}_kl": divergence}


def judgement(subject: Subject, quantized: Any) -> tuple[float, float]:
    """Share of labelled images that a quantized network gets right, and how far it has moved.

    Returns:
      The share; and the mean Kullback-Leibler divergence of its class probabilities from those of
      the float network, in nats, which tells sets of images apart where the share does not.
    """
    import jax
    import numpy as np
    from scipy.special import log_softmax, rel_entr

    from dfq_jax.quantization.simulate import simulate

    if "float" not in subject.programs:
        from dfq_jax import predict

        subject.programs["float"] = log_softmax(outputs(predict, subject.model, subject), axis=1)
        subject.programs["simulate"] = jax.jit(simulate)
    found = outputs(subject.programs["simulate"], quantized, subject)
    expected = np.exp(subject.programs["float"])
    divergence = rel_entr(expected, np.exp(log_softmax(found, axis=1))).sum(1).mean()
    return float(np.mean(found.argmax(1) == subject.judged[1])), float(divergence)


def outputs(run: Callable[..., Any], network: Any, subject: Subject) -> Any:
    """Logits of all labelled images, in double precision."""
    import jax.numpy as jnp
    import numpy as np

    pixels, size = subject.judged[0], 250 if subject.name == "resnet20" else 50
    parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
    return np.concatenate([np.asarray(run(network, jnp.asarray(x)), np.float64) for x in parts])


if __name__ == "__main__":
    main()
