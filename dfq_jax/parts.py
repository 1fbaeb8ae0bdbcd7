"""What methods are made of: take these for one of your own.

A `Recipe` has a `Source`, `Stage`s and `Term`s, which look at `Observed`; a `Reconstruction` has a
`Rounding`, `Phase`s and a loss. Plans, observers and levels say what is quantized and how.
"""

from dfq_jax.allocation.allocate import Allocation, allocate, pareto
from dfq_jax.allocation.choices import Space, space_of
from dfq_jax.allocation.costs import Budget, cost, parse_budget
from dfq_jax.allocation.sensitivity import sensitivities
from dfq_jax.graph.evaluate import chained
from dfq_jax.graph.evaluate import evaluate as run_graph
from dfq_jax.graph.tasks import (
    Classifier,
    DenseClassifier,
    Detector,
    Embedding,
    ImageToImage,
    LanguageModel,
    PlainValues,
)
from dfq_jax.io.artifacts.quantized_arrays import load_arrays, save_arrays
from dfq_jax.numerics.affine import Affine, Grid, fake_quantize
from dfq_jax.numerics.levels import QuantizedArray, quantized
from dfq_jax.numerics.ranges import Aciq, EmaMinMax, Entropy, Lp, LpShift, MinMax, Omse, Percentile
from dfq_jax.numerics.rounding import Rounding, nearest
from dfq_jax.optim.fit import fit
from dfq_jax.optim.progress import Progress, UnitReport
from dfq_jax.optim.progress import RunPhase as RunPhase
from dfq_jax.optim.schedules import adam_to_zero, adam_with_plateau, rated, warmup_cosine
from dfq_jax.optim.state import Place
from dfq_jax.optim.steps import Player, Step, descent, in_turn
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.observers import Observers, observer_named
from dfq_jax.quantization.plan import Scheme, Site, Spec, parse_scheme, resolve
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.recipes.probes import probes_of
from dfq_jax.recipes.reconstructions import Enlarge, enlarged, reconstructed, surfaces
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.method import (
    Phase,
    Rates,
    Reconstruction,
    fisher_gap,
    relative_gap,
    squared_gap,
)
from dfq_jax.report.analyze import analyze
from dfq_jax.report.trust import estimate
from dfq_jax.synthesis.recipe import Memory, Source, Stage, balanced_labels, random_labels, recorded
from dfq_jax.synthesis.run.engine import Synthesized, synthesize_images
from dfq_jax.synthesis.run.shards import ImageShards, load_shards
from dfq_jax.synthesis.sources.augment import blur, flip, halve, jitter, random_crop, resized_crop
from dfq_jax.synthesis.sources.collages import collage
from dfq_jax.synthesis.sources.generator import latent_source
from dfq_jax.synthesis.sources.pixels import (
    from_natural,
    from_pixels,
    gaussian,
    pink,
    to_natural,
    to_pixels,
    uniform,
)
from dfq_jax.synthesis.sources.swing import swing
from dfq_jax.synthesis.terms.base import (
    Observed,
    Term,
    cross_entropy,
    image_statistics,
    label_entropy,
    total_variation,
)
from dfq_jax.synthesis.terms.match import batch_std_gap, batch_var_gap, kl_match, matched
from dfq_jax.synthesis.terms.patches import patch_entropy
from dfq_jax.synthesis.terms.targets import Forward, recorded_statistics
from dfq_jax.values import bound

__all__ = [
    "Aciq",
    "Affine",
    "Allocation",
    "Budget",
    "Classifier",
    "ClosedForm",
    "DenseClassifier",
    "Detector",
    "EmaMinMax",
    "Embedding",
    "Enlarge",
    "Entropy",
    "Forward",
    "Grid",
    "ImageShards",
    "ImageToImage",
    "LanguageModel",
    "Lp",
    "LpShift",
    "Memory",
    "MinMax",
    "Observed",
    "Observers",
    "Omse",
    "Percentile",
    "Phase",
    "Place",
    "PlainValues",
    "Player",
    "Progress",
    "QuantizedArray",
    "Rates",
    "Reconstruction",
    "Rounding",
    "RunPhase",
    "Scheme",
    "Site",
    "Source",
    "Space",
    "Spec",
    "Stage",
    "Step",
    "Synthesized",
    "Term",
    "UnitReport",
    "adam_to_zero",
    "adam_with_plateau",
    "allocate",
    "analyze",
    "balanced_labels",
    "batch_std_gap",
    "batch_var_gap",
    "blur",
    "bound",
    "calibrate",
    "chained",
    "collage",
    "cost",
    "cross_entropy",
    "descent",
    "enlarged",
    "estimate",
    "fake_quantize",
    "fisher_gap",
    "fit",
    "flip",
    "from_natural",
    "from_pixels",
    "gaussian",
    "halve",
    "image_statistics",
    "in_turn",
    "jitter",
    "kl_match",
    "label_entropy",
    "latent_source",
    "load_arrays",
    "load_shards",
    "matched",
    "nearest",
    "observer_named",
    "pareto",
    "parse_budget",
    "parse_rule",
    "parse_scheme",
    "patch_entropy",
    "pink",
    "probes_of",
    "quantized",
    "random_crop",
    "random_labels",
    "rated",
    "reconstruct",
    "reconstructed",
    "recorded",
    "recorded_statistics",
    "relative_gap",
    "resized_crop",
    "resolve",
    "run_graph",
    "save_arrays",
    "sensitivities",
    "space_of",
    "squared_gap",
    "surfaces",
    "swing",
    "synthesize_images",
    "to_natural",
    "to_pixels",
    "total_variation",
    "uniform",
    "warmup_cosine",
]
