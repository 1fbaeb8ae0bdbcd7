"""Data-free quantization: a trained checkpoint in, a verified integer model out, no data needed.

The library is imported when the first of its names is asked for: importing JAX takes seconds, and
`dfq --help` needs none of it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfq_jax.api.functions import (
        bench,
        evaluate,
        export,
        load,
        predict,
        verify,
    )
    from dfq_jax.api.quantize import quantize
    from dfq_jax.api.result import Result
    from dfq_jax.api.synthesize import synthesize, synthesize_set
    from dfq_jax.errors import DfqError
    from dfq_jax.examples import Examples
    from dfq_jax.graph.graph import Graph, Model, Node, compose
    from dfq_jax.graph.query import describe
    from dfq_jax.quantization.plan import Plan, Rule
    from dfq_jax.quantization.simulate import QuantizedModel, simulate
    from dfq_jax.types import InputContract, Moments

PLACES = {
    "api.functions": ("bench", "evaluate", "export", "load", "predict", "verify"),
    "errors": ("DfqError",),
    "examples": ("Examples",),
    "graph.graph": ("Graph", "Model", "Node", "compose"),
    "graph.query": ("describe",),
    "api.synthesize": ("synthesize", "synthesize_set"),
    "quantization.plan": ("Plan", "Rule"),
    "quantization.simulate": ("QuantizedModel", "simulate"),
    "api.quantize": ("quantize",),
    "api.result": ("Result",),
    "types": ("InputContract", "Moments"),
}
"""{module: names of it that are this package's}."""

__all__ = [
    "DfqError",
    "Examples",
    "Graph",
    "InputContract",
    "Model",
    "Moments",
    "Node",
    "Plan",
    "QuantizedModel",
    "Result",
    "Rule",
    "bench",
    "compose",
    "describe",
    "evaluate",
    "export",
    "load",
    "predict",
    "quantize",
    "simulate",
    "synthesize",
    "synthesize_set",
    "verify",
]


class Face(ModuleType):
    """This package as its users see it."""

    def __getattr__(self, name: str) -> Any:
        """Imports the library, for a name that is not there yet."""
        if not name.startswith("__"):
            for place, names in PLACES.items():
                module = importlib.import_module(f"{self.__name__}.{place}")
                for each in names:
                    vars(self)[each] = getattr(module, each)
        if name not in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """The folder `quantize` does not hide the function, whichever is imported first."""
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """What is there and what will be."""
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = Face
