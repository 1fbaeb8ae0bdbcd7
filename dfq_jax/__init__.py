"""Data-free quantization: a trained checkpoint in, a verified integer model out, no data needed."""

from dfq_jax.api import (
    bench,
    evaluate,
    export,
    load,
    predict,
    verify,
)
from dfq_jax.errors import DfqError
from dfq_jax.graph.graph import Graph, Model, Node, compose
from dfq_jax.graph.query import describe
from dfq_jax.imaging import synthesize, synthesize_set
from dfq_jax.quantize.plan import Plan, Rule
from dfq_jax.quantize.simulate import QuantizedModel, simulate
from dfq_jax.quantizing import quantize
from dfq_jax.result import Result
from dfq_jax.types import ImageSet, InputContract, Moments

__all__ = [
    "DfqError",
    "Graph",
    "ImageSet",
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
