"""The public functions: load, predict, synthesize, quantize, evaluate, verify, bench, export."""

import dataclasses
import importlib.metadata
import io
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.data.accuracy import Accuracy
from dfq_jax.data.accuracy import evaluate as measure
from dfq_jax.data.sources import open_source
from dfq_jax.errors import DataError, UsageError
from dfq_jax.files import write_atomically
from dfq_jax.graph.evaluate import evaluate as run_graph
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts import Artifact, fingerprint, load_artifact, save_artifact
from dfq_jax.io.latency import Latency
from dfq_jax.io.latency import bench as time_both
from dfq_jax.io.load import load as load_file
from dfq_jax.io.onnx_out import float_onnx, quantized_onnx, serialize
from dfq_jax.io.runtime import contract_of, predictor
from dfq_jax.io.verify import Verification
from dfq_jax.io.verify import verify as compare_runtimes
from dfq_jax.quantize.plan import LayerPreset, Rule, parse_scheme
from dfq_jax.quantize.simulate import QuantizedModel
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.presets import Preset, image_budget, recipe_for
from dfq_jax.report.analyze import Report, analyze
from dfq_jax.report.html import report_html
from dfq_jax.synthesis.pixels import from_pixels, to_pixels
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run import Progress, synthesize_images
from dfq_jax.types import ImageSet, InputContract

PROBE = "probe.npz"
MOST_PROBES = 16

Stage = Callable[[str], None]


def load(path_or_name: str | Path, *, arch: str | None = None, size: int | None = None) -> Model:
    """Reads a network; `dfq_jax.io.load.load` also returns notes and the identity of the file.

    Args:
      path_or_name: a checkpoint (`.pth`, `.th`, `.pt`, `.safetensors`) with `arch`, or the name of
        a built-in architecture whose weights an installed package carries.
      arch: name of the architecture of a checkpoint.
      size: pixels along each side the network reads; None for the published size.

    Returns:
      The network, batch norms in place.

    Raises:
      DfqError: one of its children; see `dfq_jax.errors`.
    """
    return load_file(path_or_name, arch=arch, size=size).model


@jax.jit
def predict(model: Model, images: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
    """Scores of a float network for images (NHWC, normalised by `model.contract`)."""
    return run_graph(model, images)[0][0]


def synthesize(
    model: Model,
    n: int = 256,
    *,
    method: str = "best",
    key: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    state_folder: Path | None = None,
) -> ImageSet:
    """Makes images from the network alone.

    Args:
      model: network with its batch norms in place.
      n: how many images.
      method: `dsg` (diverse, the present `best`) or `zeroq`.
      key: seed; equal seeds give equal images on one kind of device.
      steps: optimisation steps of a batch; None for the method's own.
      batch: images optimised together; None for the method's own.
      on_progress: called after every few steps.
      state_folder: keeps state here and resumes from it.

    Returns:
      Images in the network's normalised input space, with provenance.

    Raises:
      UsageError: for a bad method, n, steps or batch, or a state folder of another run.
      UnsupportedModelError: if the network has no usable batch-norm statistics.
      DivergedError: if the optimisation diverges in spite of smaller learning rates.
    """
    if n < 1:
        raise UsageError(f"synthesize() needs n >= 1, got {n}.")
    recipe = recipe_for(method, steps, batch)
    facts = provenance(model, recipe, n, key)
    start = time.perf_counter()
    made = synthesize_images(
        model,
        recipe,
        n,
        jax.random.key(key),
        on_progress=on_progress,
        state_folder=state_folder,
        fingerprint=facts,
    )
    outcome = {
        "final_losses": list(made.losses),
        "excluded": [str(u) for u in made.excluded],
        "seconds": round(time.perf_counter() - start, 2),
    }
    return ImageSet(made.images, model.contract, {**facts, **outcome})


def provenance(model: Model, recipe: Recipe, n: int, key: int) -> dict[str, Any]:
    """What a set of images depends on; a saved state is usable only if all of it is equal."""
    return {
        "method": recipe.name,
        "settings": dict(recipe.settings),
        "steps": recipe.steps,
        "batch": recipe.batch,
        "n": n,
        "seed": key,
        "weights_sha256": fingerprint(model),
        "size": list(model.contract.shape),
        "versions": {name: importlib.metadata.version(name) for name in ("dfq-jax", "jax")},
        "device": jax.devices()[0].platform,
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """A quantized network with its trust report.

    Attributes:
      quantized: the network.
      float_model: what it came from.
      images: all images, synthesized or given.
      probes: the images that judged the result.
      report: how far to trust it.
      settings: the resolved configuration, plain data.
    """

    quantized: QuantizedModel
    float_model: Model
    images: ImageSet
    probes: ImageSet
    report: Report
    settings: Mapping[str, Any]

    def verify(self) -> Verification:
        """Compares simulator, integer function and ONNX Runtime on the probes."""
        file = serialize(quantized_onnx(self.quantized))
        return compare_runtimes(self.quantized, file, probe_images(self.probe_bytes, self.contract))

    @property
    def contract(self) -> InputContract:
        """The input contract of the network."""
        return self.float_model.contract

    @property
    def probe_bytes(self) -> bytes:
        """Up to 16 probes as 8-bit pixels in an `.npz`, kept to verify the network again."""
        buffer = io.BytesIO()
        pixels = to_pixels(self.probes.images[:MOST_PROBES], self.contract)
        np.savez_compressed(buffer, pixels=pixels)
        return buffer.getvalue()

    def save(
        self,
        folder: str | Path,
        *,
        source: Mapping[str, Any] | None = None,
        verification: Verification | None = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """Writes the output folder; a collapsed network as `model.failed.onnx`.

        Args:
          folder: absent, empty, or an earlier output of ours.
          source: where the weights came from, plain data.
          verification: what `verify` found, to be kept in the report.
          force: also write beside files of others.

        Returns:
          The manifest.

        Raises:
          UsageError: if the folder must not be written to.
          ResourceError: if the disk is full.
        """
        report = {**self.report.to_dict(), "settings": dict(self.settings)}
        found = None if verification is None else verification.to_dict()
        page = report_html(self.report, self.images, self.settings, found)
        return save_artifact(
            folder,
            self.quantized,
            float_model=self.float_model,
            images_provenance=self.images.provenance,
            report={**report, "verification": found},
            preset=str(self.settings["preset"]),
            seed=int(self.settings["seed"]),
            source=source,
            files={"report.html": page, PROBE: self.probe_bytes},
            force=force,
            failed=not self.report.passed,
        )


def quantize(
    model: Model,
    images: ImageSet | None = None,
    *,
    scheme: str = "w8a8",
    preset: Preset = "fast",
    layers: LayerPreset = "qdrop_8bit_ends",
    method: str | None = None,
    rules: Iterable[Rule] = (),
    key: int = 0,
    on_stage: Stage = lambda _: None,
    on_progress: Callable[[Progress], None] | None = None,
    state_folder: Path | None = None,
) -> Result:
    """Quantizes a network without data.

    Args:
      model: network with its batch norms in place.
      images: calibration images, a quarter of them held out; None to synthesize them.
      scheme: `w{2..8}a{2..8}`.
      preset: `fast` (a handful of images), `balanced` (many, diverse) or `best` (the same today).
      layers: which layers stay at 8 bits.
      method: how to synthesize, instead of the preset's choice.
      rules: bits of particular layers.
      key: seed of everything random.
      on_stage: told what is being done.
      on_progress: told how synthesis advances.
      state_folder: keeps synthesis state here and resumes from it.

    Raises:
      UsageError: for a bad scheme, preset or rule, or images of another input contract.
      UnsupportedModelError: if images are needed and cannot be synthesized.
    """
    bits, budget = parse_scheme(scheme), image_budget(preset, model.contract)
    if images is None:
        chosen = method or budget.method
        on_stage(f"synthesizing {budget.n} images ({chosen})")
        images = synthesize(
            model,
            budget.n,
            method=chosen,
            key=key,
            steps=budget.steps,
            on_progress=on_progress,
            state_folder=state_folder,
        )
    check_contract(images, model.contract)
    images = deliverable(images)
    seen, probes = split_probes(images)
    made = dfq(model, seen.images, bits, layers=layers, rules=rules, on_stage=on_stage)
    on_stage("judging on held-out images")
    report = analyze(made.reference, made.quantized, probes.images)
    settings = {
        "scheme": str(bits),
        "preset": preset,
        "layers": layers,
        "seed": key,
        "images": f"{len(images)} ({images.provenance.get('method', 'given')})",
        "held out": len(probes) if probes is not seen else 0,
    }
    return Result(made.quantized, model, images, probes, report, settings)


def deliverable(images: ImageSet) -> ImageSet:
    """The images a camera could deliver: 8-bit pixels. What lies outside is clipped."""
    pixels = to_pixels(images.images, images.contract)
    return dataclasses.replace(images, images=from_pixels(pixels, images.contract))


def split_probes(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Three quarters to calibrate with, one to judge by; fewer than 4 images do both."""
    return images.split(len(images) // 4) if len(images) >= 4 else (images, images)


def check_contract(images: ImageSet, contract: InputContract) -> None:
    """Refuses images made for another input.

    Raises:
      UsageError: naming the first field that differs.
    """
    for field in ("height", "width", "mean", "std"):
        given, wanted = getattr(images.contract, field), getattr(contract, field)
        if given != wanted:
            raise UsageError(
                f"the images were made for {field} {given}, the network reads {wanted}; "
                "synthesize them from this network."
            )


def evaluate(
    model: Model | str | Path,
    data: str,
    *,
    limit: int | None = None,
    batch: int = 50,
    on_batch: Callable[[int, int, float], object] | None = None,
) -> Accuracy:
    """Accuracy on labelled images: a Model runs in JAX, a file or folder in ONNX Runtime.

    Args:
      model: a network, an output folder of `quantize`, or a `.onnx` file with our metadata.
      data: a folder of class folders, a zip of one, or `tfds:NAME[:SPLIT]`.
      limit: judge only so many images, evenly spaced.
      batch: images at a time.
      on_batch: told (done, total, top-1 so far).

    Returns:
      Top-1, top-5 and the number of images.

    Raises:
      DataError: for data or a folder that cannot be read.
    """
    if isinstance(model, Model):
        contract, run = model.contract, lambda x: predict(model, x)
    else:
        file = load_artifact(model).onnx_path if Path(model).is_dir() else Path(model)
        contract, run = stated_contract(file), predictor(file)
    return measure(run, open_source(data), contract, batch=batch, limit=limit, on_batch=on_batch)


def stated_contract(file: Path) -> InputContract:
    """The input contract an ONNX file carries.

    Raises:
      DataError: if it carries none.
    """
    contract = contract_of(file)
    if contract is None:
        raise DataError(
            f"{file} does not say how its input is normalised (no dfq.contract metadata); "
            "evaluate the output folder of `dfq quantize` instead."
        )
    return contract


def verify(folder: str | Path) -> Verification:
    """Compares the network in an output folder with ONNX Runtime, on the probes kept there.

    Args:
      folder: output folder of `quantize`.

    Returns:
      Differences by layer in quantization steps, and end to end.

    Raises:
      DataError: if the folder is damaged.
      ImportError: if ONNX Runtime is not installed.
    """
    artifact = load_artifact(folder)
    probes = (artifact.folder / PROBE).read_bytes()
    contract = artifact.quantized.model.contract
    return compare_runtimes(artifact.quantized, artifact.onnx_path, probe_images(probes, contract))


def probe_images(data: bytes, contract: InputContract) -> Float[Array, "n h w c"]:
    """Network input from the bytes of a probe file."""
    with np.load(io.BytesIO(data), allow_pickle=False) as saved:
        return from_pixels(saved["pixels"], contract)


def bench(folder: str | Path, *, runs: int = 50) -> Latency:
    """Float against integer latency of an output folder, batch 1, in ONNX Runtime here."""
    artifact: Artifact = load_artifact(folder)
    return time_both(artifact.float_path, artifact.onnx_path, runs=runs)


def export(model: Model | QuantizedModel, path: str | Path) -> None:
    """Writes a network as ONNX: float, or in QDQ form if it is quantized.

    Args:
      model: the network.
      path: the `.onnx` file; replaced atomically.

    Raises:
      ExportError: if ONNX cannot express it.
    """
    proto = float_onnx(model) if isinstance(model, Model) else quantized_onnx(model)
    write_atomically(path, serialize(proto))
