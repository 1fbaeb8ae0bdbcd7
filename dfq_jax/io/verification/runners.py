"""What a file is run by, to be compared with: ONNX Runtime, or else ONNX's own reference."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.version_converter import convert_version

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.runtime.session import (
    File,
    cpu_features,
    onnxruntime,
    open_session,
    opset_of,
    saturation_risk,
)

FIRST_KNOWN = 19
"""The first opset of which the reference evaluator knows what quantizes."""
RUNTIME, REFERENCE = "ONNX Runtime", "the ONNX reference evaluator"
OFF, ON, PRECISE = "onnxruntime off", "onnxruntime on", "onnxruntime precise"
"""Without optimisations; as people run it; and where that saturates, in the mode that does not."""


class Runners(NamedTuple):
    """What runs a file.

    Attributes:
      name: `ONNX Runtime` or `the ONNX reference evaluator`.
      version: of it.
      ways: (name of an `EndCheck`, session), the first of which reveals every tensor asked for and
        optimises nothing.
      warnings: what comparing with these does not show, in sentences.
    """

    name: str
    version: str
    ways: tuple[tuple[str, Any], ...]
    warnings: tuple[str, ...]


def runners_of(file: File, revealing: bytes, threads: int) -> Runners:
    """ONNX Runtime where it is installed and runs the file, ONNX's reference evaluator elsewhere.

    Args:
      file: path or bytes of the .onnx file.
      revealing: the same with more outputs.
      threads: of ONNX Runtime.

    Returns:
      What runs them.

    Raises:
      DataError: if the file is damaged.
      UnsupportedModelError: if neither runs it.
    """
    try:
        off = Guarded(open_session(revealing, optimize=False, threads=threads))
        on = Guarded(open_session(file, optimize=True, threads=threads))
    except (ImportError, UnsupportedModelError) as error:
        session = ReferenceSession(revealing, str(error))
        told = (
            f"Compared with ONNX's reference evaluator, which shows that the file means what it "
            f"should, but not that a runtime computes it so: {error}"
        )
        return Runners(REFERENCE, onnx.__version__, (("onnx reference", session),), (told,))
    ways = ((OFF, off), (ON, on))
    if saturation_risk(cpu_features()):
        precise = open_session(file, optimize=True, threads=threads, precise=True)
        ways += ((PRECISE, Guarded(precise)),)
    return Runners(RUNTIME, onnxruntime().__version__, ways, ())


class Guarded:
    """A session of ONNX Runtime, whose failures while it runs are told as errors of the library."""

    def __init__(self, session: Any) -> None:
        """Takes an `onnxruntime.InferenceSession`."""
        self.session = session
        self.get_inputs = session.get_inputs

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names.

        Raises:
          UnsupportedModelError: if an operator fails.
        """
        try:
            return self.session.run(list(names), dict(feeds))
        except MemoryError:
            raise
        except Exception as error:
            told = str(error).partition("\n")[0]
            raise UnsupportedModelError(f"ONNX Runtime stopped in the file: {told}") from error


class ReferenceSession:
    """ONNX's reference evaluator, called as a session of ONNX Runtime is.

    Args:
      file: of any opset that has operators for quantization.
      reason: why it is needed, for messages.
    """

    def __init__(self, file: bytes, reason: str) -> None:
        self.reason = reason
        proto = onnx.load_model_from_string(file)
        with self.refused():
            if opset_of(proto) < FIRST_KNOWN:
                proto = convert_version(proto, FIRST_KNOWN)
            self.evaluator = ReferenceEvaluator(proto)
        self.inputs = [
            SimpleNamespace(
                name=x.name,
                shape=[d.dim_value or d.dim_param for d in x.type.tensor_type.shape.dim],
            )
            for x in proto.graph.input
        ]

    def get_inputs(self) -> list[SimpleNamespace]:
        """The inputs' names and shapes."""
        return self.inputs

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names."""
        with self.refused():
            return [np.asarray(value) for value in self.evaluator.run(list(names), dict(feeds))]

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Turns whatever goes wrong in it into UnsupportedModelError: it may be anything."""
        try:
            yield
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.reason} (ONNX's reference evaluator would take its place, but cannot run "
                f"the file: {error})"
            ) from error
