"""What methods are made of: take these for one of your own.

A `Recipe` has a `Source`, `Stage`s and `Term`s, which look at `Observed`; a `Reconstruction` has a
`Rounding`, `Phase`s and a loss; a `Training` has a `StudentKind`, images and `Term`s, which look at
a `Lesson`. Plans, observers and levels say what is quantized and how.
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
from dfq_jax.quantization.vertical import VerticalNetwork, as_cut, narrowed
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
from dfq_jax.synthesis.terms.centres import ClassCentres, class_centres
from dfq_jax.synthesis.terms.match import batch_std_gap, batch_var_gap, kl_match, matched
from dfq_jax.synthesis.terms.patches import patch_entropy
from dfq_jax.synthesis.terms.targets import Forward, recorded_statistics
from dfq_jax.training.adaptation import adapted
from dfq_jax.training.binary import (
    balanced_signs,
    error_decay,
    held_signs,
    signed_activations,
    within_delta,
)
from dfq_jax.training.binary_start import on_binary_activations, with_hard_tanh
from dfq_jax.training.engine import TrainingReport, TrainingSetup, trained
from dfq_jax.training.gates import PrunedByScales, pruned_by_scales
from dfq_jax.training.generator import GeneratorKind, labelled_noise, plain_noise
from dfq_jax.training.in_float import trained_in_float
from dfq_jax.training.level_rules import LevelRule, as_calibrated, clipped, learned_steps, min_max
from dfq_jax.training.losses import (
    Answers,
    Lesson,
    attention_transfer,
    block_outputs,
    branch_outputs,
    channel_attention,
    direction_gap,
    distillation,
    easy_label_loss,
    embedding_loss,
    feature_gap,
    label_loss,
    margin_loss,
    relation_loss,
    score_gap,
    spatial_attention,
    symmetric_divergence,
)
from dfq_jax.training.method import (
    FixedImages,
    FixedRows,
    GeneratedImages,
    cosine_sgd,
    milestones,
    nesterov,
    rates_apart,
    to_zero,
)
from dfq_jax.training.student import StudentKind
from dfq_jax.training.tracking import Tracking
from dfq_jax.training.transfer import distilled, initialised
from dfq_jax.training.vertical import trained_vertically
from dfq_jax.training.wrappers import perturbed_images, sharpness_aware
from dfq_jax.values import bound

__all__ = [
    "Aciq",
    "Affine",
    "Allocation",
    "Answers",
    "Budget",
    "ClassCentres",
    "Classifier",
    "ClosedForm",
    "DenseClassifier",
    "Detector",
    "EmaMinMax",
    "Embedding",
    "Enlarge",
    "Entropy",
    "FixedImages",
    "FixedRows",
    "Forward",
    "GeneratedImages",
    "GeneratorKind",
    "Grid",
    "ImageShards",
    "ImageToImage",
    "LanguageModel",
    "Lesson",
    "LevelRule",
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
    "PrunedByScales",
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
    "StudentKind",
    "Synthesized",
    "Term",
    "Tracking",
    "TrainingReport",
    "TrainingSetup",
    "UnitReport",
    "VerticalNetwork",
    "adam_to_zero",
    "adam_with_plateau",
    "adapted",
    "allocate",
    "analyze",
    "as_calibrated",
    "as_cut",
    "attention_transfer",
    "balanced_labels",
    "balanced_signs",
    "batch_std_gap",
    "batch_var_gap",
    "block_outputs",
    "blur",
    "bound",
    "branch_outputs",
    "calibrate",
    "chained",
    "channel_attention",
    "class_centres",
    "clipped",
    "collage",
    "cosine_sgd",
    "cost",
    "cross_entropy",
    "descent",
    "direction_gap",
    "distillation",
    "distilled",
    "easy_label_loss",
    "embedding_loss",
    "enlarged",
    "error_decay",
    "estimate",
    "fake_quantize",
    "feature_gap",
    "fisher_gap",
    "fit",
    "flip",
    "from_natural",
    "from_pixels",
    "gaussian",
    "halve",
    "held_signs",
    "image_statistics",
    "in_turn",
    "initialised",
    "jitter",
    "kl_match",
    "label_entropy",
    "label_loss",
    "labelled_noise",
    "latent_source",
    "learned_steps",
    "load_arrays",
    "load_shards",
    "margin_loss",
    "matched",
    "milestones",
    "min_max",
    "narrowed",
    "nearest",
    "nesterov",
    "observer_named",
    "on_binary_activations",
    "pareto",
    "parse_budget",
    "parse_rule",
    "parse_scheme",
    "patch_entropy",
    "perturbed_images",
    "pink",
    "plain_noise",
    "probes_of",
    "pruned_by_scales",
    "quantized",
    "random_crop",
    "random_labels",
    "rated",
    "rates_apart",
    "reconstruct",
    "reconstructed",
    "recorded",
    "recorded_statistics",
    "relation_loss",
    "relative_gap",
    "resized_crop",
    "resolve",
    "run_graph",
    "save_arrays",
    "score_gap",
    "sensitivities",
    "sharpness_aware",
    "signed_activations",
    "space_of",
    "spatial_attention",
    "squared_gap",
    "surfaces",
    "swing",
    "symmetric_divergence",
    "synthesize_images",
    "to_natural",
    "to_pixels",
    "to_zero",
    "total_variation",
    "trained",
    "trained_in_float",
    "trained_vertically",
    "uniform",
    "warmup_cosine",
    "with_hard_tanh",
    "within_delta",
]
