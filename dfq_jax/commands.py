"""What the verbs of the command line do, between parsed arguments and the Python API."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from dfq_jax import api
from dfq_jax.config import CONFIG, settings_toml
from dfq_jax.errors import QualityError, UnsupportedModelError
from dfq_jax.graph.query import batch_norms, describe, macs, parameter_count
from dfq_jax.io.artifacts import check_output_folder, load_artifact
from dfq_jax.io.images import load_images
from dfq_jax.io.load import Loaded, ReadOptions, load_with
from dfq_jax.io.onnx_out import check_size
from dfq_jax.io.verify import Verification
from dfq_jax.io.verify_runners import RUNTIME
from dfq_jax.options import QuantizeOptions
from dfq_jax.quantize.plan import parse_scheme
from dfq_jax.quantizing import quantize
from dfq_jax.recipes.noise import NO_STATISTICS
from dfq_jax.report.plots import BITS_HEADER, FRONT_HEADER, bit_rows, front_rows
from dfq_jax.report.terminal import (
    LAYER_HEADER,
    Terminal,
    coverage_line,
    float_line,
    layer_rows,
    trust_lines,
    units_lines,
)
from dfq_jax.report.trust import check_accuracy
from dfq_jax.result import Result
from dfq_jax.synthesis.memory import bytes_from
from dfq_jax.synthesis.targets import recorded_statistics
from dfq_jax.types import InputContract


def emit(terminal: Terminal, data: dict[str, Any]) -> None:
    """Prints the JSON object of a `--json` run."""
    if terminal.quiet:
        print(json.dumps(data, allow_nan=False))


def read_model(model: str, reading: ReadOptions, terminal: Terminal) -> Loaded:
    """Loads a network and logs what is worth knowing about it."""
    loaded = load_with(model, reading)
    terminal.stage(f"read {loaded.source} as {loaded.architecture}")
    for note in loaded.notes:
        terminal.note(f"  {note}")
    return loaded


def contract_line(contract: InputContract) -> str:
    """The input contract in words."""
    assumed = " (assumed: the checkpoint does not say)" if contract.assumed else ""
    rounded = lambda values: "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
    return (
        f"input {contract.height}x{contract.width} {contract.colours}, (pixel/255 - "
        f"{rounded(contract.mean)}) / {rounded(contract.std)}{assumed}"
    )


def inspect_model(model: str, reading: ReadOptions, terminal: Terminal) -> None:
    """`dfq inspect`."""
    loaded = read_model(model, reading, terminal)
    network = loaded.model
    targets, excluded = recorded_statistics(network)
    usable, remarks = len(targets), [str(u) for u in excluded]
    if not targets:
        remarks.append(NO_STATISTICS)
    total, work = len(batch_norms(network.graph)), sum(macs(network).values())
    terminal.say(describe(network))
    terminal.say(f"{parameter_count(network):,} values, {work:,} multiply-accumulates an image")
    terminal.say(f"{usable} of {total} batch norms usable for synthesis")
    for remark in remarks:
        terminal.say(f"  {remark}")
    terminal.say(contract_line(network.contract))
    emit(
        terminal,
        {
            "architecture": loaded.architecture,
            "source": loaded.source,
            "sha256": loaded.sha256,
            "values": parameter_count(network),
            "macs": work,
            "nodes": [str(n) for n in network.graph.nodes],
            "batch_norms": total,
            "usable_batch_norms": usable,
            "contract": dataclasses.asdict(network.contract),
            "notes": [*loaded.notes, *remarks],
        },
    )


def state_folder(output: Path) -> Path:
    """Where a run keeps what it needs to resume: beside its output."""
    output = output.resolve()
    return output.with_name(f".{output.name}.run")


def remove_state(folder: Path) -> None:
    """Deletes the state of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def quantize_to(model: str, options: QuantizeOptions, terminal: Terminal) -> None:
    """`dfq quantize`."""
    parse_scheme(options.scheme)
    check_accuracy(options.accuracy)
    memory = None if options.memory is None else bytes_from(options.memory)
    check_output_folder(options.output, options.force, names=(CONFIG,))
    loaded = read_model(model, options.reading, terminal)
    check_size(4 * parameter_count(loaded.model))
    state = state_folder(options.output)
    with terminal.progress():
        result = quantize(
            loaded.model,
            None if options.images is None else load_images(options.images),
            scheme=options.scheme,
            preset=options.preset,
            layers=options.layers,
            method=options.method,
            reconstruction=options.reconstruction,
            reconstruction_steps=options.reconstruction_steps,
            observer=options.observer,
            budget=options.budget,
            sensitivity=options.sensitivity,
            accuracy=options.accuracy,
            key=options.seed,
            memory=memory,
            on_stage=terminal.stage,
            on_progress=terminal.step,
            on_unit=terminal.unit,
            state_folder=state,
        )
    verification = verified(result, terminal)
    terminal.stage(f"writing {options.output}")
    source = {"name": loaded.source, "sha256": loaded.sha256, "architecture": loaded.architecture}
    manifest = result.save(
        options.output,
        source=source,
        verification=verification,
        files={CONFIG: settings_toml("quantize", options)},
        force=options.force,
    )
    remove_state(state)
    show_result(result, verification, manifest, loaded, options, terminal)
    if not result.report.passed:
        raise QualityError(
            f"{result.report.failure}: saved as {options.output / 'model.failed.onnx'}. "
            "Use more bits (--scheme), --preset balanced, or another --layers preset."
        )
    if verification is not None and not verification.passed:
        raise QualityError(
            f"the file does not compute what was simulated ({verification.most_steps} steps apart, "
            f"same top-1 on {100 * verification.agreement:.1f} %): saved as "
            f"{options.output / 'model.failed.onnx'}. Please report it with the network."
        )


def verified(result: Result, terminal: Terminal) -> Verification | None:
    """Compares the result with what runs its file, if anything does."""
    terminal.stage("verifying against ONNX Runtime")
    try:
        return result.verify()
    except UnsupportedModelError as error:
        terminal.note(f"  not verified: {error}")
        return None


def show_result(
    result: Result,
    verification: Verification | None,
    manifest: dict[str, Any],
    loaded: Loaded,
    options: QuantizeOptions,
    terminal: Terminal,
) -> None:
    """The table and the trust lines at the end of `dfq quantize`."""
    report = result.report
    files = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    model = next(name for name in files if name in ("model.onnx", "model.failed.onnx"))
    before, after = files["float.onnx"], files[model]
    if (mix := result.mixed) is not None:
        rows = bit_rows(mix.space, mix.losses, mix.chosen, mix.uniform)
        terminal.table("bits by layer", BITS_HEADER, rows)
        terminal.table("best allocations", FRONT_HEADER, front_rows(mix.space, mix.front))
    terminal.table("", LAYER_HEADER, layer_rows(report))
    terminal.say("")
    terminal.say(f"{loaded.architecture} {options.scheme}, layers {options.layers}")
    terminal.say(coverage_line(report))
    if rest := float_line(report):
        terminal.say(rest)
    terminal.say(
        f"on disk {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({100 * after / before:.1f} %)"
    )
    terminal.say(contract_line(result.contract))
    for line in [*units_lines(report), *trust_lines(report)]:
        terminal.say(line)
    if verification is not None:
        for warning in verification.warnings:
            terminal.note(warning)
        terminal.say(verification_line(verification))
    terminal.say(
        f"{'saved' if model == 'model.onnx' else 'FAILED, kept'}: {options.output / model}"
    )
    emit(
        terminal,
        {
            "status": manifest["status"],
            "out": str(options.output),
            "model": str(options.output / model),
            "scheme": options.scheme,
            "layers": options.layers,
            "bytes_float": before,
            "bytes_int": after,
            "report": manifest["report"],
            "seconds": terminal.elapsed,
        },
    )


def verification_line(found: Verification) -> str:
    """The comparison with what runs the file in one line."""
    ties = f" (without {100 * found.undecided:.1f} % ties)" if found.undecided else ""
    optimised = " with optimisations on" if found.runner == RUNTIME else ""
    return (
        f"{'verified' if found.passed else 'NOT VERIFIED'} against {found.runner} {found.runtime}: "
        f"at most {found.most_steps} step apart in any of {len(found.layers)} tensors, same top-1 "
        f"on {100 * found.agreement:.1f} % of {found.images} images{ties}{optimised}"
    )


def evaluate_on(
    model: str, data: str, limit: int | None, reading: ReadOptions, terminal: Terminal
) -> None:
    """`dfq evaluate`."""
    path = Path(model)
    runs_in_onnx = path.is_dir() or (path.suffix == ".onnx" and path.exists())
    target = path if runs_in_onnx else read_model(model, reading, terminal).model
    progress = lambda done, total, top1: terminal.every(f"{done}/{total}: top-1 {100 * top1:.2f} %")
    found = api.evaluate(target, data, limit=limit, on_batch=progress)
    terminal.say(f"top-1 {100 * found.top1:.2f} %, top-5 {100 * found.top5:.2f} % of {found.n}")
    emit(terminal, found.to_dict())


def verify_folder(folder: Path, terminal: Terminal) -> None:
    """`dfq verify`."""
    found = api.verify(folder)
    rows = [
        [
            c.tensor,
            str(c.bits),
            f"{c.simulator_steps}",
            f"{100 * c.simulator_equal:.3f} %",
            f"{c.integer_steps}",
            f"{100 * c.integer_equal:.3f} %",
        ]
        for c in found.layers
    ]
    header = ("tensor", "bits", "simulator steps", "equal", "integer steps", "equal")
    terminal.table(f"against {found.runner}, optimisations off", header, rows)
    for end in found.ends:
        terminal.say(
            f"{end.runner}: logits within {end.difference:.3g} of the simulator, "
            f"same top-1 on {100 * end.agreement:.1f} %"
        )
    for warning in found.warnings:
        terminal.note(warning)
    terminal.say(verification_line(found))
    emit(terminal, found.to_dict())
    if not found.passed:
        raise QualityError(f"{folder} does not compute what it was verified to compute.")


def bench_folder(folder: Path, runs: int, terminal: Terminal) -> None:
    """`dfq bench`."""
    found = api.bench(folder, runs=runs)
    scheme = load_artifact(folder).manifest["scheme"]
    header = ("network", "ms an image")
    rows = [["float32", f"{found.float_ms:.2f}"], [scheme, f"{found.int_ms:.2f}"]]
    terminal.table(
        f"ONNX Runtime {found.runtime}, {found.threads} threads, {', '.join(found.features)}",
        header,
        rows,
    )
    terminal.say(f"the integer network is {found.speedup:.2f}x as fast")
    for warning in found.warnings:
        terminal.note(warning)
    emit(terminal, found.to_dict())
