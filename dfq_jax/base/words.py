"""Words a user chooses from, apart from what they mean: help and usage need no JAX."""

from typing import Literal

LayerPreset = Literal[
    "zsq_all_low",
    "qdrop_8bit_ends",
    "brecq_8bit_ends_second",
    "qdrop_8bit_ends_shortcuts",
    "brecq_8bit_ends_second_shortcuts",
]
Preset = Literal["fast", "balanced", "best"]
Sensitivity = Literal["kl", "fisher", "trace"]
TaskName = Literal["classifier", "dense", "image", "embedding", "detector", "language", "values"]
Store = Literal["packed", "int8", "int4"]
"""How kernels of fewer than 8 bits lie in the file.

`packed`: as many bits as they have, unpacked to int8 when a runtime loads the file. `int8`: a byte
each. `int4`: up to 4 bits in ONNX's own 4-bit integers, which ONNX Runtime multiplies as floats.
"""
MethodName = Literal[
    "best",
    "best_unlabelled",
    "dsg",
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
    "aac",
    "noise",
]
ReconstructionName = Literal[
    "nearest",
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
TrainingName = Literal["best", "gdfq", "qimera", "intraq_qat", "hast", "synq"]
"""How a network is trained without data."""
ObserverName = Literal[
    "min_max", "ema", "percentile", "lp", "lp_shift", "omse", "aciq", "entropy", "statistics"
]
