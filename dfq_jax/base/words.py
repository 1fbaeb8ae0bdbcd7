"""Words a user chooses from, apart from what they mean: help and usage need no JAX."""

from typing import Literal

LayerPreset = Literal[
    "zsq_all_low",
    "qdrop_8bit_ends",
    "brecq_8bit_ends_second",
    "qdrop_8bit_ends_shortcuts",
    "brecq_8bit_ends_second_shortcuts",
    "zsq_all_rectified",
]
Precision = Literal["float32", "bfloat16"]
Preset = Literal["fast", "balanced", "best"]
Sensitivity = Literal["kl", "fisher", "trace"]
TaskName = Literal["classifier", "dense", "image", "embedding", "detector", "language", "values"]
Store = Literal["packed", "int8", "int4"]
"""How kernels of fewer than 8 bits lie in the file.

`packed`: as many bits as they have, unpacked to int8 when a runtime loads the file. `int8`: a byte
each. `int4`: up to 4 bits in ONNX's own 4-bit integers, which ONNX Runtime multiplies as floats.
"""
DEFAULT_STORE: Store = "packed"
"""Small files that run as integers."""
MethodName = Literal[
    "best",
    "best_unlabelled",
    "dsg",
    "dsg_journal",
    "zeroq",
    "deepinversion",
    "knowledge_within",
    "intraq",
    "hard_samples",
    "clusterq",
    "mct",
    "genie",
    "gzsq",
    "psaq_vit",
    "sardfq",
    "aac",
    "noise",
]
ReconstructionName = Literal[
    "nearest",
    "squant",
    "stochastic",
    "udfc",
    "closed_form",
    "adaround",
    "brecq",
    "qdrop",
    "genie_m",
    "flexround",
    "pd_quant",
    "aquant",
    "stages",
    "best",
]
TrainingName = Literal[
    "best",
    "gdfq",
    "qimera",
    "dsg_qat",
    "clusterq_qat",
    "aac_abn",
    "adadfq",
    "fdda_qat",
    "choi",
    "zaq",
    "zhu",
    "ir_net",
    "dir_net",
    "vertical_layered",
    "intraq_qat",
    "hast",
    "synq",
    "quantface",
    "ait",
    "zsaq",
]
"""How a network is trained without data."""
ObserverName = Literal[
    "min_max",
    "ema",
    "image_min_max",
    "percentile",
    "lp",
    "lp_shift",
    "omse",
    "aciq",
    "entropy",
    "statistics",
]
WeightObserverName = Literal["min_max", "percentile", "lp", "lp_shift", "omse", "aciq", "entropy"]
Equalization = Literal["pairs", "groups", "none"]
"""Which layers are equalized: pairs, as in DFQ, groups across sums too, or none."""
Relu6 = Literal["keep", "replace"]
"""What becomes of ReLU6 that keep layers from equalization."""
BiasCorrection = Literal["analytic", "empirical", "both", "none"]
BitsByName = Literal["scheme", "joint"]
"""Who says how many bits weights have: the scheme, or one choice of bits and channels."""
CriterionName = Literal[
    "energy",
    "reconstruction",
    "l1",
    "l2",
    "median",
    "norm",
    "group",
    "taylor",
    "fisher",
]
"""How channels are judged that may go."""
RestorationName = Literal["ridge", "norms", "udfc", "lbyl", "merging", "means", "none"]
"""What makes up for channels that are gone."""
Channels = Literal["inner", "all"]
"""Which channels may go: all but what sums carry from block to block, or those too."""
Rivals = Literal["layer", "global", "alike"]
"""Whose channels compete: those of a layer, of all, or of layers of one structure."""
