"""Latency in ONNX Runtime, batch 1, 2 threads: float, dfq_jax, and onnxruntime's own quantizer.

The reference is `onnxruntime.quantization.quantize_static` (QDQ, per channel, unsigned activations,
signed weights) on the same float file, calibrated by minima and maxima on 100 real images and on
100 images of Gaussian noise. All take turns; the medians count. Results of `dfq quantize` younger
than the code are reused, others made.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import artifacts
import common
from artifacts import NETWORKS, Run
from common import Column, Row

THREADS = 2
CALIBRATION = 100
TABLES = {
    "latency": (
        Column("network", "network"),
        Column("model", "model"),
        Column("ms", "ms an image", ".2f"),
        Column("speedup", "float/this", ".2f"),
        Column("top1", "top-1 %", ".2fx100"),
        Column("top5", "top-5 %", ".2fx100"),
        Column("note", "note"),
    )
}


def main() -> None:
    """Times and judges every file of the chosen networks."""
    parser = common.parser(__doc__)
    known = common.choices(NETWORKS)
    parser.add_argument("--networks", type=known, default=tuple(NETWORKS), metavar="A,B")
    parser.add_argument("--rounds", type=int, default=20, help="turns of every file")
    parser.add_argument("--limit", type=int, help="judge by so many images only")
    args = parser.parse_args()
    runs = [Run(name, "w8a8", artifacts.LAYERS[0], "fast", 0) for name in args.networks]
    runs, reason = artifacts.available(args, runs)
    rows = [row for run in runs for row in compared(run, args)]
    common.finish(args, TABLES, rows, reason)


def compared(run: Run, args: argparse.Namespace) -> list[Row]:
    """The rows of one network."""
    if failure := run.ensure(args.shared):
        return [{"table": "latency", "network": run.network, "model": "int8", "note": failure}]
    from dfq_jax.io.artifacts.artifact import load_artifact

    artifact = load_artifact(run.folder)
    with tempfile.TemporaryDirectory() as folder:
        real, noise = Path(folder, "real.onnx"), Path(folder, "noise.onnx")
        contract = artifact.quantized.model.contract
        source = args.shared / NETWORKS[run.network].real
        quantize_static(artifact.float_path, real, real_images(source, contract))
        quantize_static(artifact.float_path, noise, gaussian_images(contract))
        files = {
            "float32": artifact.float_path,
            "dfq_jax w8a8, no data": artifact.onnx_path,
            "onnxruntime w8a8, 100 real images": real,
            "onnxruntime w8a8, Gaussian noise": noise,
        }
        times = timed(files, args.rounds)
        data = args.shared / NETWORKS[run.network].data
        return [
            {
                "table": "latency",
                "network": run.network,
                "model": name,
                "ms": times[name],
                "speedup": times["float32"] / times[name],
                **judged(file, data, contract, args.limit),
            }
            for name, file in files.items()
        ]


def timed(files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Median milliseconds of one image; the files take turns."""
    from dfq_jax.io.runtime.latency import random_feed
    from dfq_jax.io.runtime.session import open_session

    runs = {}
    for name, file in files.items():
        session = open_session(file, optimize=True, threads=THREADS)
        runs[name] = partial(session.run, None, random_feed(session, 1, None))
    # the threads of a session keep spinning for a while after its turn: warm up past that
    times = common.interleaved(runs, rounds, block=10, warmup=5)
    common.log(", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    return times


def judged(file: Path, data: Path, contract: Any, limit: int | None) -> Row:
    """Accuracy of a file in ONNX Runtime."""
    from dfq_jax.data.accuracy import measured_accuracy
    from dfq_jax.data.sources import open_source
    from dfq_jax.io.runtime.session import predictor

    run = predictor(file, threads=THREADS)
    found = measured_accuracy(run, open_source(str(data)), contract, batch=50, limit=limit)
    common.log(f"{file.name}: top-1 {100 * found.top1:.2f} %")
    return {"top1": found.top1, "top5": found.top5, "n": found.n}


def real_images(data: Path, contract: Any) -> Iterator[Any]:
    """Images evenly spaced over the classes, (1, height, width, channels)."""
    from dfq_jax.data.accuracy import load_example, pick
    from dfq_jax.data.sources import open_source

    source = open_source(str(data))
    for index in pick(len(source), CALIBRATION):
        yield load_example(source, index, contract)[0][None]


def gaussian_images(contract: Any) -> Iterator[Any]:
    """Normal noise, (1, height, width, channels)."""
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(CALIBRATION):
        yield rng.standard_normal((1, *contract.shape), np.float32)


def quantize_static(source: Path, target: Path, images: Iterator[Any]) -> None:
    """onnxruntime's quantizer, preceded by the folding its documentation asks for."""
    import logging

    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(source, load_external_data=False).graph.input[0].name
    feeds = ({name: image.transpose(0, 3, 1, 2)} for image in images)

    class Reader(quantization.CalibrationDataReader):
        """Hands out one image at a time."""

        def get_next(self) -> Any:
            return next(feeds, None)

    logging.getLogger().setLevel(logging.ERROR)
    folded = target.with_suffix(".folded.onnx")
    quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(folded),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


if __name__ == "__main__":
    main()
