"""The expected loss that a report tells without data, against the loss measured on labelled images.

Every row is one quantized network: estimated from probes made of the network alone, with its
accuracy unknown and known, and measured by the simulator (which computes what the file does) on
labelled images. Besides schemes and presets, networks are spoiled on purpose: ranges shrunk
(`clip60`: to 60 %) or widened (`wide8`: 8 times), those of the last quarter of the network shrunk
(`lateclip25`), one layer with noise on its kernel (`ruin100`: of its own deviation), biases
shifted (`bias30`: by 30 % of their deviation). A measured loss has a chance of its own: 0.4 points
where 2 % of 1,000 images change class.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import artifacts
import common
import numpy as np
from common import Column, Row

TABLES = {
    "trust": (
        Column("network", "network"),
        Column("scheme", "scheme"),
        Column("preset", "preset"),
        Column("images", "images"),
        Column("float_top1", "FP32 top-1 %", ".2fx100"),
        Column("loss", "measured loss", ".2fx100"),
        Column("estimate", "estimate", ".2fx100"),
        Column("low", "low", ".2fx100"),
        Column("high", "high", ".2fx100"),
        Column("covered", "covered"),
        Column("estimate_known", "estimate, accuracy known", ".2fx100"),
        Column("covered_known", "covered"),
    ),
    "trust_summary": (
        Column("network", "network"),
        Column("pairs", "pairs"),
        Column("rank", "rank correlation", ".3f"),
        Column("coverage", "covered %", ".0fx100"),
        Column("error", "median error below 5 points", ".2fx100"),
        Column("rank_known", "rank correlation, accuracy known", ".3f"),
        Column("coverage_known", "covered %", ".0fx100"),
        Column("error_known", "median error below 5 points", ".2fx100"),
    ),
}
SCHEMES = "w8a8,w6a6,w4a8,w8a4,w4a4,w3a4,w2a4,w2a2"
SPOILED = "clip60,clip30,lateclip25,wide4,wide8,wide16,ruin100,bias30"
SMALL_LOSS = 0.05


def main() -> None:
    """Quantizes, spoils, estimates and measures the chosen networks."""
    parser = common.parser(__doc__)
    of = common.choices
    every = artifacts.NETWORKS
    parser.add_argument("--networks", type=of(every), default=tuple(every), metavar="A,B")
    parser.add_argument("--schemes", type=common.names, default=common.names(SCHEMES))
    parser.add_argument("--presets", type=of(artifacts.PRESETS), default=("fast",))
    parser.add_argument("--spoiled", type=common.names, default=common.names(SPOILED))
    parser.add_argument("--limit", type=int, default=2000, help="labelled images of a network")
    args = parser.parse_args()
    there, reason = artifacts.present(args.shared, args.networks)
    rows = list(itertools.chain.from_iterable(rows_of(name, args) for name in there))
    common.finish(args, TABLES, [*rows, *summaries(rows)], reason)


def rows_of(name: str, args: Any) -> list[Row]:
    """The rows of a network."""
    import dfq_jax
    from dfq_jax.passes.fold import fold_batch_norm
    from dfq_jax.recipes.probes import probes_of
    from dfq_jax.report.trust import estimate

    network = artifacts.NETWORKS[name]
    path = network.model if network.arch is None else args.shared / network.model
    model = dfq_jax.load(path, arch=network.arch)
    data, reference, probes = args.shared / network.data, fold_batch_norm(model), probes_of(model)
    before = dfq_jax.evaluate(model, str(data), limit=args.limit)
    whole: list[tuple[str, str, Any]] = []
    for scheme, preset in itertools.product(args.schemes, args.presets):
        made = dfq_jax.quantize(model, scheme=scheme, preset=preset, probes=probes)
        whole.append((scheme, preset, made.quantized))
    base = next((q for scheme, _, q in whole if scheme == "w8a8"), None)
    if base is not None:
        whole += [("w8a8", how, spoiled(base, how)) for how in args.spoiled]
    rows = []
    for scheme, preset, quantized in whole:
        after = measured(quantized, str(data), args.limit)
        found = [estimate(reference, quantized, probes.images, a) for a in (None, before.top1)]
        made = row(name, scheme, preset, before.n, before.top1, before.top1 - after, *found)
        rows.append(made)
        common.logged(made, TABLES["trust"])
    return rows


def measured(quantized: Any, data: str, limit: int) -> float:
    """Top-1 of a quantized network on labelled images, by the simulator."""
    import jax

    from dfq_jax.data.accuracy import measured_accuracy
    from dfq_jax.data.sources import open_source
    from dfq_jax.quantization.simulate import simulate

    run = partial(jax.jit(simulate), quantized)
    return measured_accuracy(
        run, open_source(data), quantized.model.contract, batch=50, limit=limit
    ).top1


def row(
    network: str,
    scheme: str,
    preset: str,
    images: int,
    float_top1: float,
    loss: float,
    unknown: Any,
    known: Any,
) -> Row:
    """One row from what was measured and the estimates without and with the accuracy."""
    inside = lambda found: "yes" if found.low <= loss <= found.high else "no"
    return {
        "table": "trust",
        "network": network,
        "scheme": scheme,
        "preset": preset,
        "images": images,
        "float_top1": float_top1,
        "loss": loss,
        "estimate": unknown.loss,
        "low": unknown.low,
        "high": unknown.high,
        "covered": inside(unknown),
        "estimate_known": known.loss,
        "covered_known": inside(known),
    }


def summaries(rows: Sequence[Row]) -> list[Row]:
    """How well estimates rank and hit, by network and over all."""
    names = [*dict.fromkeys(row["network"] for row in rows)]
    groups = {name: [row for row in rows if row["network"] == name] for name in names}
    return [summary(name, own) for name, own in [*groups.items(), ("all", list(rows))] if own]


def summary(name: str, rows: Sequence[Row]) -> Row:
    """The summary of some rows; no rank correlation of fewer than three."""
    made: Row = {"table": "trust_summary", "network": name, "pairs": len(rows)}
    losses = np.array([row["loss"] for row in rows])
    for suffix in ("", "_known"):
        found = np.array([row["estimate" + suffix] for row in rows])
        small = losses < SMALL_LOSS
        made |= {
            "rank" + suffix: rank_correlation(losses, found) if len(rows) > 2 else None,
            "coverage" + suffix: np.mean([row["covered" + suffix] == "yes" for row in rows]).item(),
            "error" + suffix: float(np.median(np.abs(losses - found)[small]))
            if small.any()
            else None,
        }
    return made


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; ties share their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def spoiled(quantized: Any, how: str) -> Any:
    """A quantized network with something wrong, by its name and strength."""
    kind, strength = how.rstrip("0123456789"), int(how[len(how.rstrip("0123456789")) :])
    random = np.random.default_rng(1)
    if kind in ("clip", "lateclip", "wide"):
        return rescaled(quantized, kind, strength if kind == "wide" else strength / 100)
    if kind == "ruin":
        layers = [name for name, slots in quantized.model.params.items() if "kernel" in slots]
        return shaken(quantized, layers[len(layers) // 2 :][:1], "kernel", strength / 100, random)
    layers = [name for name, slots in quantized.model.params.items() if "bias" in slots]
    return shaken(quantized, layers, "bias", strength / 100, random)


def rescaled(quantized: Any, kind: str, factor: float) -> Any:
    """The network with ranges of activations scaled; of `clip` but for the first eighth."""
    sites = [site for site in quantized.qparams if site.argument is not None]
    first = {"clip": len(sites) // 8, "lateclip": 3 * len(sites) // 4, "wide": 0}[kind]
    scaled = {
        site: quantized.qparams[site]._replace(scale=quantized.qparams[site].scale * factor)
        for site in sites[first:]
    }
    return dataclasses.replace(quantized, qparams={**quantized.qparams, **scaled})


def shaken(quantized: Any, layers: list[str], slot: str, size: float, random: Any) -> Any:
    """The network with normal noise on a parameter of some layers, in units of its deviation."""
    params = dict(quantized.model.params)
    for name in layers:
        values = np.asarray(params[name][slot])
        noise = size * max(values.std(), 1e-6) * random.standard_normal(values.shape)
        params[name] = {**params[name], slot: (values + noise).astype(np.float32)}
    return dataclasses.replace(quantized, model=dataclasses.replace(quantized.model, params=params))


if __name__ == "__main__":
    main()
