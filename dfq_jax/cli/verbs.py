"""What the verbs of the command line do, between parsed arguments and the Python API."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from dfq_jax.api import functions as api
from dfq_jax.api.quantize import quantize
from dfq_jax.api.result import PROBE, Result
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.claims import check_apart, claimed, remove_state, state_folder
from dfq_jax.cli.config import CONFIG, other_model, settings_toml
from dfq_jax.cli.options import QuantizeOptions
from dfq_jax.cli.sizes import foretell, size_line, speed_lines, timed
from dfq_jax.errors import DataError, DfqError, QualityError
from dfq_jax.graph.query import batch_norms, describe, macs, parameter_count
from dfq_jax.io.artifacts.artifact import check_output_folder, load_artifact
from dfq_jax.io.load import Loaded, ReadOptions, load_with
from dfq_jax.io.onnx.export import check_size
from dfq_jax.io.runtime.latency import Latency
from dfq_jax.io.runtime.session import (
    PRECISE,
    SATURATES,
    contract_of,
    cpu_features,
    saturation_risk,
)
from dfq_jax.io.verification.verify import Verification
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.noise import NO_STATISTICS
from dfq_jax.report.analyze import Report
from dfq_jax.report.console import Terminal, one_line
from dfq_jax.report.plots import BITS_HEADER, FRONT_HEADER, bit_rows, front_rows
from dfq_jax.report.terminal import (
    LAYER_HEADER,
    blame_line,
    coverage_line,
    float_line,
    layer_rows,
    shared_line,
    trust_lines,
    units_lines,
)
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import NHWC, InputContract


def emit(terminal: Terminal, data: dict[str, Any]) -> None:
    """Prints the JSON object of a `--json` run."""
    if terminal.quiet:
        print(json.dumps(data, allow_nan=False))


def read_model(model: str, reading: ReadOptions, terminal: Terminal) -> Loaded:
    """Loads a network and logs what is worth knowing about it."""
    loaded = load_with(model, reading)
    terminal.stage(one_line(f"read {loaded.source} as {loaded.architecture}"))
    for note in loaded.notes:
        terminal.note(f"  {one_line(note)}")
    return loaded


def source_of(loaded: Loaded) -> dict[str, str]:
    """Which file a network is from."""
    return {"name": loaded.source, "sha256": loaded.sha256, "architecture": loaded.architecture}


def contract_line(contract: InputContract) -> str:
    """The input contract in words."""
    assumed = " (assumed: the file does not say)" if contract.assumed else ""
    where = f"; files read {contract.layout}" if contract.layout == NHWC else ""
    rounded = lambda values: "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
    return (
        f"input {contract.height}x{contract.width} {contract.colours}, (pixel/255 - "
        f"{rounded(contract.mean)}) / {rounded(contract.std)}{assumed}{where}"
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
        terminal.say(f"  {one_line(remark)}")
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


def quantize_to(model: str, options: QuantizeOptions, terminal: Terminal) -> None:
    """`dfq quantize`."""
    check_apart(MODEL=model, images=options.images, output=options.output)
    with claimed(options.output):
        quantize_there(model, options, terminal)


def quantize_there(model: str, options: QuantizeOptions, terminal: Terminal) -> None:
    """`dfq quantize` once its output is claimed."""
    settings = settings_of(options)
    check_output_folder(options.output, options.force, names=(CONFIG,))
    state = state_folder(options.output)
    with terminal.progress():
        loaded = read_model(model, options.reading, terminal)
        if other := other_model(options.config, loaded.sha256):
            terminal.note(f"  {one_line(other)}")
        check_size(4 * parameter_count(loaded.model))
        foretell(parse_scheme(options.scheme), options.store, terminal)
        result = quantize(
            loaded.model,
            options.images,
            **settings,
            watch=terminal.watcher,
            state_folder=state,
        )
        found, latency = checked(result, terminal), timed(result.time, terminal)
    terminal.stage(f"writing {options.output}")
    source = source_of(loaded)
    manifest = result.save(
        options.output,
        source=source,
        verification=found.verification,
        latency=latency,
        unverified=found.reason,
        failed=bool(found.fault),
        files={CONFIG: settings_toml("quantize", options, source)},
        force=options.force,
    )
    remove_state(state)
    if result.images.given:
        tell_of_images(options.output, terminal)
    show_result(result, found.verification, latency, manifest, loaded, options, terminal)
    if not result.report.passed:
        raise QualityError(
            f"{result.report.failure}: saved as {options.output / 'model.failed.onnx'}. "
            f"{remedy_line(result.report, options.output)}"
        )
    if found.fault:
        raise QualityError(
            f"the file did not verify: {found.fault}. Saved as "
            f"{options.output / 'model.failed.onnx'}. Please report it with the network."
        )


def tell_of_images(output: Path, terminal: Terminal) -> None:
    """Says which files keep images that were given."""
    kept = f"{PROBE} and report.html keep some of your images, to verify and to look at"
    terminal.note(f"{output}: {kept}; leave these files out where images are private")


def remedy_line(report: Report, output: Path) -> str:
    """What to do about a result that failed."""
    if not report.finite:
        return (
            "More bits do not mend that: look at the weights of the first of them, and at --mean "
            "and --std."
        )
    return (
        f"{blame_line(report)}`dfq doctor {shlex.quote(str(output))}` computes what more bits and "
        "other settings would buy."
    )


class Checked(NamedTuple):
    """What came of verification.

    Attributes:
      verification: what it found, None if it could not be carried out.
      reason: why it could not, in words.
      failed: whether that is the file's fault.
    """

    verification: Verification | None
    reason: str = ""
    failed: bool = False

    @property
    def fault(self) -> str:
        """Why the file must not be called a success; empty if it may."""
        if self.verification is not None:
            return "; ".join(self.verification.failures)
        return self.reason if self.failed else ""


def checked(result: Result, terminal: Terminal) -> Checked:
    """Compares the result with what runs its file; whatever goes wrong there, the result is kept.

    A file that does not hold the network has failed. All else that stops the comparison says
    nothing about the file: it stays unverified, with a note.
    """
    terminal.stage("verifying against ONNX Runtime")
    try:
        return Checked(result.verify())
    except DataError as error:
        return Checked(None, str(error), failed=True)
    except Exception as error:
        known = isinstance(error, DfqError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        terminal.note(f"  not verified: {reason}")
        return Checked(None, reason)


def show_result(
    result: Result,
    verification: Verification | None,
    latency: Latency | None,
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
    for rest in filter(None, (float_line(report), shared_line(report))):
        terminal.say(rest)
    terminal.say(size_line(before, after, options.output / model, options.store))
    for line in speed_lines(latency):
        terminal.say(line)
    terminal.say(contract_line(result.contract))
    for line in [*units_lines(report), *trust_lines(report)]:
        terminal.say(line)
    if verification is not None:
        for warning in verification.warnings:
            terminal.note(warning)
        for line in verification_lines(verification):
            terminal.say(line)
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
            "store": options.store,
            "speedup": None if latency is None else latency.speedup,
            "report": manifest["report"],
            "seconds": terminal.elapsed,
        },
    )


def apart(steps: int) -> str:
    """How far codes are from each other, in words."""
    return "not a step apart" if steps == 0 else f"at most {steps} step{'s' * (steps > 1)} apart"


def verification_lines(found: Verification) -> list[str]:
    """The comparison with what runs the file, and each rule that it breaks."""
    whose = f"against {found.runner} {found.runtime} on {found.images} images"
    if not found.passed:
        return [f"NOT VERIFIED {whose}", *(f"  {told}" for told in found.failures)]
    every = sum(output.decisions for output in found.outputs)
    lines = [
        f"verified {whose}, byte by byte",
        f"  layers: {apart(found.most_steps)} in any of {len(found.layers)} tensors"
        if found.layers
        else "  layers: activations stay in float, so there are no codes to compare",
        f"  outputs: within {found.noise:.2f} times the noise that rounding adds",
    ]
    if every and not found.counted:
        lines.append(f"  classes: each of {every} decisions is a tie, which rounding may turn")
    elif every:
        lines.append(
            f"  classes: same in {100 * found.agreement:.1f} % of {found.counted} decisions that "
            f"are no ties, of {every} in all"
        )
    return lines


def output_rows(found: Verification) -> list[list[str]]:
    """A line for every part of every output and every way to run the network."""
    return [
        [
            output.name,
            way,
            f"{output.differences[way]:.2f}",
            f"{100 * output.agreements[way]:.1f} % of {output.counted}" if output.counted else "-",
        ]
        for output in found.outputs
        for way in output.differences
    ]


def evaluate_on(
    model: str, data: str, limit: int | None, reading: ReadOptions, terminal: Terminal
) -> None:
    """`dfq evaluate`."""
    path = Path(model)
    runs_in_onnx = path.is_dir() or (path.suffix == ".onnx" and carries_contract(path))
    if runs_in_onnx and reading != ReadOptions():
        terminal.note(f"{model} says itself what it reads; options of reading change nothing here")
    target = path if runs_in_onnx else read_model(model, reading, terminal).model
    progress = lambda done, total, top1: terminal.every(f"{done}/{total}: top-1 {100 * top1:.2f} %")
    found = api.evaluate(target, data, limit=limit, on_batch=progress)
    if runs_in_onnx and saturation_risk(cpu_features()):
        terminal.note(
            f"{SATURATES}Measured in its precise mode, as other processors compute; sessions here "
            f'do likewise with the option {PRECISE} = "1".'
        )
    terminal.say(f"top-1 {100 * found.top1:.2f} %, top-5 {100 * found.top5:.2f} % of {found.n}")
    emit(terminal, found.to_dict())


def carries_contract(path: Path) -> bool:
    """Whether an ONNX file says what it reads, so that ONNX Runtime can be fed."""
    return path.exists() and contract_of(path) is not None


def verify_folder(folder: Path, terminal: Terminal) -> None:
    """`dfq verify`."""
    found = api.verify(folder)
    rows = [
        [
            c.tensor,
            str(c.bits),
            f"{c.simulator_steps}",
            f"{100 * c.simulator_equal:.3f} %",
            "-" if c.integer_steps is None else f"{c.integer_steps}",
            "-" if c.integer_equal is None else f"{100 * c.integer_equal:.3f} %",
        ]
        for c in found.layers
    ]
    header = ("tensor", "bits", "simulator steps", "equal", "integer steps", "equal")
    terminal.table(f"against {found.runner}, optimisations off", header, rows)
    header = ("output", "against", "times the noise of rounding", "same where clear")
    terminal.table("against the simulator", header, output_rows(found))
    for warning in found.warnings:
        terminal.note(warning)
    for line in verification_lines(found):
        terminal.say(line)
    emit(terminal, found.to_dict())
    if not found.passed:
        raise QualityError(
            f"{folder} does not compute what it was verified to compute: {found.failures[0]}."
        )


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
