"""ONNX Runtime: the only place that imports it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from jaxtyping import Float, Shaped

from dfq_jax.errors import DataError, UnsupportedModelError
from dfq_jax.io.frontends.contracts import contract_in, input_in
from dfq_jax.types import NCHW, NHWC, Input, InputContract

NEEDED = ((21, (1, 18)), (19, (1, 15)), (17, (1, 12)), (0, (1, 10)))
"""(opset, first ONNX Runtime that runs it), newest first."""

FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Processor flags that decide how fast, and how, 8-bit products are computed."""

PRECISE = "session.x64quantprecision"
"""ONNX Runtime's own name for it (`onnxruntime_session_options_config_keys.h`)."""

WHOLE = {"tensor(int32)": np.int32, "tensor(bool)": np.bool_}
"""What files have whole numbers in where not in int64."""
File = str | Path | bytes


def onnxruntime() -> Any:
    """The module, quiet.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        import onnxruntime as module
    except ImportError as error:
        raise ImportError(
            "this needs ONNX Runtime, which is not installed: pip install dfq-jax[runtime]"
        ) from error
    return module


def open_session(file: File, *, optimize: bool, threads: int = 2, precise: bool = False) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
      file: path or bytes of an .onnx file.
      optimize: all graph optimisations, or none.
      threads: for one operator.
      precise: 8-bit products that never saturate, also on x86 processors without VNNI, where that
        takes more time.

    Returns:
      An `onnxruntime.InferenceSession`.

    Raises:
      ImportError: if ONNX Runtime is not installed.
      UnsupportedModelError: if it is too old for the file, or lacks an operator.
      DataError: if the file is damaged.
    """
    runtime = onnxruntime()
    proto = read_onnx(file)
    require_version(runtime.__version__, proto)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: they are raised here as well
    if precise:
        options.add_session_config_entry(PRECISE, "1")
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    source = file if isinstance(file, bytes) else str(file)
    errors = runtime.capi.onnxruntime_pybind11_state
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except (errors.NotImplemented, errors.Fail, errors.InvalidGraph) as error:
        raise UnsupportedModelError(
            f"ONNX Runtime {runtime.__version__} cannot run {label(file)}: {error}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of which it has many kinds
        raise DataError(f"{label(file)} is damaged: {error}") from error


def require_version(version: str, proto: onnx.ModelProto) -> None:
    """Raises UnsupportedModelError if that ONNX Runtime is too old for the file's operators."""
    opset = opset_of(proto)
    needed = next(runtime for first, runtime in NEEDED if opset >= first)
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < needed:
        least = ".".join(map(str, needed))
        raise UnsupportedModelError(
            f"the file uses ONNX opset {opset}, which needs ONNX Runtime {least} or newer, found "
            f'{version}: pip install "onnxruntime>={least}"'
        )


def opset_of(proto: onnx.ModelProto) -> int:
    """Of ONNX's own operators; 0 where none is named."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def run(
    session: Any, images: Shaped[Any, "n ..."], layout: str = NCHW
) -> Float[np.ndarray, "n ..."]:
    """First output of a session for NHWC images; one of rank 4 comes back as NHWC too.

    A file with a fixed batch gets that many images at a time.

    Raises:
      DataError: if the session cannot read such images.
    """
    size, name = fixed_batch(session) or len(images), session.get_outputs()[0].name
    parts = []
    for start in range(0, len(images), size):
        part = np.asarray(images[start : start + size])
        filled = np.pad(part, ((0, size - len(part)), *[(0, 0)] * (part.ndim - 1)))
        with unreadable_as_data():
            found = session.run([name], feed(session, filled, layout))[0]
        parts.append(found[: len(part)])
    first = np.concatenate(parts)
    return first.transpose(0, 2, 3, 1) if first.ndim == 4 and layout == NCHW else first


def fixed_batch(session: Any) -> int | None:
    """How many images a session reads at a time, if it says so."""
    shape = session.get_inputs()[0].shape
    return shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else None


@contextlib.contextmanager
def unreadable_as_data() -> Iterator[None]:
    """Turns what ONNX Runtime says of images that a file cannot read into DataError."""
    try:
        yield
    except (MemoryError, DataError):
        raise
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise DataError(f"ONNX Runtime stopped in the file: {told}") from error


def feed(session: Any, images: Shaped[Any, "n ..."], layout: str = NCHW) -> dict[str, np.ndarray]:
    """{input name: what it reads}: images in the layout of the file, ids as int64.

    Columns of numbers of tokens go to the inputs of the file, one each.
    """
    inputs, found = session.get_inputs(), np.asarray(images)
    if found.dtype.kind in "iu":
        columns = [found] if len(inputs) == 1 else np.moveaxis(found, -1, 0)
        return {x.name: as_read(x, column) for x, column in zip(inputs, columns, strict=True)}
    axes = len(inputs[0].shape)
    if found.ndim != 4 or (layout == NHWC and axes == 4):
        return {inputs[0].name: np.ascontiguousarray(found, np.float32)}
    return {inputs[0].name: as_fed(found, axes, np.float32, layout)}


def as_fed(images: Float[np.ndarray, "n h w c"], axes: int, dtype: Any, layout: str) -> np.ndarray:
    """NHWC images as a file reads them: lines and features have no height, or no size at all."""
    n, _, w, c = images.shape
    last = layout == NHWC and axes > 2
    turned = images if last else images.transpose(0, 3, 1, 2)
    line = (w, c) if last else (c, *(w,) * (axes - 2))
    return np.ascontiguousarray(turned if axes == 4 else turned.reshape(n, *line), dtype)


def as_read(source: Any, rows: np.ndarray) -> np.ndarray:
    """Whole numbers in the type of an input, which may have one for each example alone."""
    kind = WHOLE.get(getattr(source, "type", ""), np.int64)
    alone = len(getattr(source, "shape", rows.shape)) == 1
    return np.ascontiguousarray(rows.reshape(-1) if alone else rows, kind)


def predictor(
    path: str | Path, *, layout: str = NCHW, threads: int = 2
) -> Callable[..., np.ndarray]:
    """A function from normalised images (b, h, w, c) to logits, run by ONNX Runtime optimised.

    It computes what the file says: where this processor's products would saturate, in precise mode.
    """
    precise = saturation_risk(cpu_features())
    session = open_session(path, optimize=True, threads=threads, precise=precise)
    require_images(session, path)
    return lambda images: run(session, images, layout)


def require_images(session: Any, file: File) -> None:
    """Refuses a network that does not read one tensor of images in float32.

    Raises:
      UnsupportedModelError: with what it reads.
    """
    found = [(x.name, x.type, x.shape) for x in session.get_inputs()]
    if len(found) != 1 or found[0][1] != "tensor(float)" or len(found[0][2]) != 4:
        told = ", ".join(f"{name!r} {kind} {shape}" for name, kind, shape in found)
        raise UnsupportedModelError(
            f"{label(file)} reads {told or 'nothing'}; one tensor(float) of images "
            "(batch, channels, height, width) is needed."
        )


def contract_of(file: File) -> InputContract | None:
    """The input contract an .onnx file carries, None if it carries none.

    Raises:
      DataError: if the file, or what it says, is damaged.
    """
    facts = {p.key: p.value for p in read_onnx(file).metadata_props}
    return contract_in(facts, label(file))


def input_of(file: File) -> Input | None:
    """What an .onnx file says that it reads, None if it says nothing.

    Raises:
      DataError: if the file, or what it says, is damaged.
    """
    facts = {p.key: p.value for p in read_onnx(file).metadata_props}
    return input_in(facts, label(file))


def read_onnx(file: File) -> onnx.ModelProto:
    """The model in a file, without following references to other files.

    Raises:
      DataError: if it cannot be read.
    """
    try:
        if isinstance(file, bytes):
            return onnx.load_model_from_string(file)
        if Path(file).exists() and not Path(file).is_file():
            raise DataError(f"cannot read {label(file)} as ONNX: it is no regular file.")
        return onnx.load_model(str(file), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise DataError(f"cannot read {label(file)} as ONNX: {error}") from error


def label(file: File) -> str:
    """How messages call the file."""
    return "the ONNX model" if isinstance(file, bytes) else str(file)


def cpu_features(path: str | Path = "/proc/cpuinfo") -> tuple[str, ...]:
    """Those of `FEATURES` this processor has; empty where the system does not tell."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    lines = (line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    flags = set(next(lines, "").partition(":")[2].split())
    return tuple(f for f in FEATURES if f in flags)


SATURATES = (
    "This processor has AVX2 but no VNNI: ONNX Runtime's optimised 8-bit products saturate at "
    "16 bits. "
)
"""What to say where `saturation_risk` holds."""


def saturation_risk(features: tuple[str, ...]) -> bool:
    """Whether products of unsigned and signed bytes may saturate at 16 bits, as without VNNI."""
    return "avx2" in features and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(features)
