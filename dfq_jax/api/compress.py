"""`dfq.compress`: fewer channels, then fewer bits; what is lost is judged against the original."""

import dataclasses
from pathlib import Path
from typing import Unpack

from dfq_jax.api.given import GivenImages
from dfq_jax.api.quantize import check_synthesis, making_for, quantized_on, seen_for
from dfq_jax.api.request import Follow, Settings, resolved
from dfq_jax.api.result import Result, split_probes
from dfq_jax.base.words import Channels, CriterionName, RestorationName, Rivals
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import fingerprint
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import Place
from dfq_jax.pruning.budget import Ceiling, Price, parse_ceiling
from dfq_jax.pruning.choose import Floor, share_from
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruned, Pruning, what_may_go
from dfq_jax.pruning.prune import prune as pruned_by
from dfq_jax.pruning.restore import RESTORATIONS
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.foresight import pruning_foreseen
from dfq_jax.recipes.presets import ImageBudget, makes_noise
from dfq_jax.report.shapes import pruned_line

INTEGER_CHANNEL, FLOAT_CHANNEL = 17, 9
"""Bytes of an output channel: a scale and a zero point, a bias, and those of its bias."""
ORIGINAL = "original weights"
"""In reports, the name of the hash of what was pruned."""
IMAGES = 128
"""Images from which layers are fitted anew; those of `fast` would say too little."""


def compress(
    model: Model,
    images: GivenImages | None = None,
    *,
    prune: str | float | None = None,
    criterion: CriterionName | None = None,
    restore: RestorationName = "ridge",
    among: Rivals = "layer",
    channels: Channels = "inner",
    least: int = 1,
    round_to: int = 1,
    untouched: tuple[str, ...] = (),
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Removes channels, makes up for them, and quantizes what is left: all without data.

    Args:
      model: network with its batch norms in place.
      images: to restore and calibrate with, a quarter held out; None to make them.
      prune: share of the channels that may go, `30%` or 0.3; without a budget 30 %.
      criterion: how channels are judged: `reconstruction` (by what others cannot make up for; the
        default where images restore) or `energy` (expected energy behind the activation times that
        of the columns that read it; the default elsewhere),
        `l1`, `l2`, `median` (geometric; all three of filters with batch norms folded in), `norm`
        (batch norm's gain), `group` (Torch-Pruning's), `taylor` or `fisher` (gradients on images).
      restore: what makes up for them: `ridge` (layers fitted anew on images, norms re-estimated),
        `norms` (these alone), `udfc` (its pruning part), `lbyl`, `merging` (closed forms of
        weights), `means` (of ReLUs) or `none`.
      among: whose channels compete: those of a `layer`, of all (`global`), or of layers of one
        structure (`alike`).
      channels: which may go: `inner`, all but what sums carry from block to block, or `all`.
      least: channels that every layer keeps.
      round_to: channels kept are a multiple of it.
      untouched: patterns of layers that keep all.
      watch: told what is being done.
      state_folder: keeps state here and resumes from it.
      **settings: of `quantize`; a `budget` is what the smaller network may take instead of a
        share: `50% MACs`, `20MMACs`, `40% params`, `2MB` of weights. One of `4bits` or `2GBOPs`
        is of bits, as there.

    Returns:
      What `quantize` returns of the smaller network, `pruned` telling how it got smaller; losses
      are those against `model`.

    Raises:
      UsageError: for a bad argument, or images of another contract.
      UnsupportedModelError: if no channel may go.
    """
    demand, bits = demanded(prune, settings.get("budget"))
    settings["budget"] = bits
    price = price_of(settings.get("scheme", "w8a8"))
    floor = Floor(least, round_to)
    criterion = criterion or ("reconstruction" if looks(restore) else "energy")
    how = Pruning(demand, criterion, restore, among, channels, floor, untouched, price)
    follow = Follow(watch, Place(None if state_folder is None else Path(state_folder)))
    return carried_out(model, images, how, settings, follow)


def carried_out(
    model: Model, images: GivenImages | None, how: Pruning, settings: Settings, follow: Follow
) -> Result:
    """The network pruned and quantized as asked for."""
    what_may_go(Subject(model), how)
    check_synthesis(settings, given=images is not None)
    asked = resolved(model, settings)
    making = making_for(model, asked)
    making = enough(model, making) if how.looks and asked.n is None else making
    looked_at, follow = seen_for(model, images, making, asked, follow)
    made = cut_down(model, looked_at.images, how, follow)
    result = quantized_on(made.model, looked_at, asked, follow, original=model)
    told = {**result.settings, "pruned": told_of(how), ORIGINAL: fingerprint(model)}
    return dataclasses.replace(result, pruned=made, settings=told)


def cut_down(model: Model, images: Examples, how: Pruning, follow: Follow) -> Pruned:
    """The smaller network, restored on the images that do not judge it."""
    seen, _ = split_probes(images)
    expected = pruning_foreseen(model, len(seen.images) if how.looks else 0)
    dataclasses.replace(follow, foreseen={**follow.foreseen, **expected}).begins("pruning")
    watch = follow.watch
    watch.says(f"pruning by {how.criterion}, restoring by {how.restore}")
    made = pruned_by(Subject(model, seen.images if how.looks else None), how)
    for note in (pruned_line(made), *made.notes):
        watch.says(f"  {note}")
    return made


def enough(model: Model, budget: ImageBudget) -> ImageBudget:
    """As many images as restoration needs, if they are not noise, which costs nothing."""
    if makes_noise(model, budget.method):
        return budget
    return dataclasses.replace(budget, n=max(budget.n, IMAGES))


def looks(restore: str) -> bool:
    """Whether a restoration looks at images; one that there is not does not."""
    found = {str(name): how for name, how in RESTORATIONS.items()}.get(restore)
    return found is not None and found.looks


def demanded(prune: str | float | None, budget: str | None) -> tuple[float | Ceiling, str | None]:
    """How much is to go, and what is left of a budget for bits.

    Raises:
      UsageError: if both a share and a budget of structure are given, or one means nothing.
    """
    if budget is None or of_bits(budget):
        return share_from("30%" if prune is None else prune), budget
    if prune is not None:
        raise UsageError(
            f"prune={prune!r} and budget={budget!r} both say how much is to go: leave one out."
        )
    return parse_ceiling(budget), None


def of_bits(budget: str) -> bool:
    """Whether a budget is one of bits by layer."""
    return budget.strip().lower().endswith(("bit", "bits", "bops"))


def price_of(scheme: str) -> Price:
    """Bytes of what a layer stores under a scheme: codes; scale, zero point and bias a channel."""
    found = parse_scheme(scheme)
    integer = found.activation_bits is not None and found.activation_bits <= 8
    return Price(found.weight_bits, INTEGER_CHANNEL if integer else FLOAT_CHANNEL)


def told_of(how: Pruning) -> str:
    """How channels were removed, for reports."""
    share = how.share if isinstance(how.share, Ceiling) else f"{100 * how.share:.4g}%"
    what = f"to {share}" if isinstance(how.share, Ceiling) else f"{share} of"
    told = f"{what} {how.channels} channels by {how.criterion}, restored by {how.restore}"
    more = "" if how.among == "layer" else f", {how.among}"
    floor = [f"{name} {v}" for name, v in how.floor._asdict().items() if v > 1]
    return ", ".join([told + more, *floor, *(f"not {pattern}" for pattern in how.untouched)])
