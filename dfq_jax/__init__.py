"""Data-free quantization: a trained checkpoint in, a verified integer model out, no data needed.

The library is imported when the first of its names is asked for: importing JAX takes seconds, and
`dfq --help` needs none of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfq_jax import edits, methods, parts
    from dfq_jax.api.compress import compress
    from dfq_jax.api.functions import (
        bench,
        evaluate,
        export,
        load,
        narrow,
        predict,
        verify,
    )
    from dfq_jax.api.quantize import quantize
    from dfq_jax.api.result import Result
    from dfq_jax.api.synthesize import synthesize, synthesize_set
    from dfq_jax.api.train import train
    from dfq_jax.api.transfer import adapt, distill
    from dfq_jax.base.parallel import Machine
    from dfq_jax.errors import DfqError
    from dfq_jax.examples import Examples
    from dfq_jax.graph.graph import Graph, Model, Node, compose
    from dfq_jax.graph.query import describe
    from dfq_jax.optim.progress import Watcher
    from dfq_jax.quantization.plan import Plan, Rule
    from dfq_jax.quantization.simulate import QuantizedModel, simulate
    from dfq_jax.recipes.pipeline import Pipeline, pipeline_for
    from dfq_jax.synthesis.recipe import Recipe
    from dfq_jax.training.method import Training
    from dfq_jax.types import InputContract, Moments

NAMESPACES = ("edits", "methods", "parts")
"""Modules of names that would be too many here: `dfq.methods.zeroq`."""
PLACES = {
    "api.compress": ("compress",),
    "api.functions": ("bench", "evaluate", "export", "load", "narrow", "predict", "verify"),
    "api.quantize": ("quantize",),
    "api.result": ("Result",),
    "api.synthesize": ("synthesize", "synthesize_set"),
    "api.train": ("train",),
    "api.transfer": ("adapt", "distill"),
    "base.parallel": ("Machine",),
    "errors": ("DfqError",),
    "examples": ("Examples",),
    "graph.graph": ("Graph", "Model", "Node", "compose"),
    "graph.query": ("describe",),
    "optim.progress": ("Watcher",),
    "quantization.plan": ("Plan", "Rule"),
    "quantization.simulate": ("QuantizedModel", "simulate"),
    "recipes.pipeline": ("Pipeline", "pipeline_for"),
    "synthesis.recipe": ("Recipe",),
    "training.method": ("Training",),
    "types": ("InputContract", "Moments"),
}
"""{module: names of it that are this package's}."""

__all__ = [
    "DfqError",
    "Examples",
    "Graph",
    "InputContract",
    "Machine",
    "Model",
    "Moments",
    "Node",
    "Pipeline",
    "Plan",
    "QuantizedModel",
    "Recipe",
    "Result",
    "Rule",
    "Training",
    "Watcher",
    "adapt",
    "bench",
    "compose",
    "compress",
    "describe",
    "distill",
    "edits",
    "evaluate",
    "export",
    "load",
    "methods",
    "narrow",
    "parts",
    "pipeline_for",
    "predict",
    "quantize",
    "simulate",
    "synthesize",
    "synthesize_set",
    "train",
    "verify",
]

if not TYPE_CHECKING:  # whoever checks types knows all names, and that there are no others

    def __getattr__(name: str) -> Any:
        """Imports the library, or a part of it, for a name that is not there yet."""
        if name in NAMESPACES:
            return importlib.import_module(f"{__name__}.{name}")
        if not name.startswith("__"):
            for place, names in PLACES.items():
                module = importlib.import_module(f"{__name__}.{place}")
                globals().update({each: getattr(module, each) for each in names})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        """What is there and what will be."""
        return sorted({*globals(), *__all__})
