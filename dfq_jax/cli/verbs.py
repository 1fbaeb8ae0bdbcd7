"""What the verbs of the command line do, between parsed arguments and the Python API."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dfq_jax.api import functions as api
from dfq_jax.api.language import evaluate_text
from dfq_jax.api.quantize import quantize
from dfq_jax.api.result import Result
from dfq_jax.api.shrinking import stays_float
from dfq_jax.base.finite import finite_data
from dfq_jax.base.words import DEFAULT_STORE
from dfq_jax.cli.arguments import settings_of
from dfq_jax.cli.claims import claimed, state_folder
from dfq_jax.cli.config import CONFIG, other_model, settings_toml
from dfq_jax.cli.delivery import (
    Delivery,
    checked_and_timed,
    contract_line,
    deliver,
    emit,
    verification_lines,
)
from dfq_jax.cli.options import IntegerOptions, QuantizeOptions, TrainOptions
from dfq_jax.cli.refusals import check_places, checks_of, refuse_together
from dfq_jax.cli.sizes import foretell
from dfq_jax.errors import QualityError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import batch_norms, describe, macs, parameter_count
from dfq_jax.graph.tasks import A_NOUN, noun_of
from dfq_jax.io.artifacts.artifact import check_output_folder, load_artifact
from dfq_jax.io.artifacts.graph_json import inputs_to_json
from dfq_jax.io.load import Loaded, ReadOptions, load_with
from dfq_jax.io.onnx.export import check_file_size
from dfq_jax.io.runtime.session import (
    PRECISE,
    SATURATES,
    cpu_features,
    input_of,
    saturation_risk,
)
from dfq_jax.io.verification.verify import Verification
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.noise import NO_STATISTICS
from dfq_jax.recipes.rows import makes_rows
from dfq_jax.report.console import Terminal, one_line
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import Input, InputContract


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


def inspect_model(model: str, reading: ReadOptions, terminal: Terminal) -> None:
    """`dfq inspect`; also of a network whose batch norms an exporter folded away, which is told."""
    loaded = read_model(model, dataclasses.replace(reading, no_bn_fallback=True), terminal)
    network = loaded.model
    targets, excluded = recorded_statistics(network)
    usable, remarks = len(targets), [str(u) for u in excluded]
    if not targets and not makes_rows(network):
        remarks.append(NO_STATISTICS)
    total, work = len(batch_norms(network.graph)), sum(macs(network).values())
    terminal.say(describe(network))
    each = A_NOUN[noun_of(network.inputs[0])]
    terminal.say(f"{parameter_count(network):,} values, {work:,} multiply-accumulates {each}")
    terminal.say(f"{usable} of {total} batch norms usable for synthesis")
    for remark in remarks:
        terminal.say(f"  {one_line(remark)}")
    terminal.say(contract_line(network.input))
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
            **inputs_to_json(network.inputs),
            "notes": [*loaded.notes, *remarks],
        },
    )


def quantize_to(model: str, options: QuantizeOptions, terminal: Terminal) -> None:
    """`dfq quantize`."""
    refuse_together(*checks_of(options), *check_places(model, options))
    work = partial(quantize, **settings_of(options))
    make_to(MakingVerb("quantize", options, work, options.scheme), model, terminal)


class MakingVerb(NamedTuple):
    """A verb that makes something of a network.

    Attributes:
      name: on the command line.
      options: of the verb.
      work: given the network, images, who watches and where state lies, makes the result.
      scheme: bits, of which is told what they do to bytes and speed; None where a start has them.
    """

    name: str
    options: IntegerOptions | TrainOptions
    work: Callable[..., Result]
    scheme: str | None


def make_to(verb: MakingVerb, model: str, terminal: Terminal) -> None:
    """Has something made of a network, and delivers it.

    Args:
      verb: what is made.
      model: where the network is.
      terminal: where it is told.
    """
    options, output = verb.options, verb.options.output
    with claimed(output):
        check_output_folder(output, options.force, names=(CONFIG,))
        state = state_folder(output)
        with terminal.progress():
            loaded = read_model(model, options.reading, terminal)
            if other := other_model(options.config, loaded.sha256):
                terminal.note(f"  {one_line(other)}")
            check_file_size(4 * parameter_count(loaded.model))
            if verb.scheme is not None:
                foretell(parse_scheme(verb.scheme), options.store or DEFAULT_STORE, terminal)
            follow = {"watch": terminal.watcher, "state_folder": state}
            result = verb.work(loaded.model, options.images, **follow)
            verified = checked_and_timed(result, terminal)
        source = source_of(loaded)
        config = settings_toml(verb.name, options, source)
        deliver(result, verified, Delivery(output, options.force, source, config), terminal)


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
    model: str,
    data: str,
    tokenizer: Path | None,
    limit: int | None,
    reading: ReadOptions,
    terminal: Terminal,
) -> None:
    """`dfq evaluate`."""
    path = Path(model)
    runs_in_onnx = path.is_dir() or (path.suffix == ".onnx" and says_what_it_reads(path))
    if runs_in_onnx and reading != ReadOptions():
        terminal.note(f"{model} says itself what it reads; options of reading change nothing here")
    target = path if runs_in_onnx else read_model(model, reading, terminal).model
    read = read_by(target)
    if read is not None and not isinstance(read, InputContract):
        found = evaluate_text(target, data, tokenizer=tokenizer, limit=limit)
        bits = found.bits_per_byte
        told = "" if bits is None else f", {bits:.3f} bits a byte"
        terminal.say(f"perplexity {found.perplexity:.3f}{told} of {found.tokens} tokens")
        emit(terminal, finite_data(dataclasses.asdict(found)))
        return
    if tokenizer is not None:
        raise UsageError("the network reads images: leave out `tokenizer=`.")
    progress = lambda done, total, top1: terminal.every(f"{done}/{total}: top-1 {100 * top1:.2f} %")
    accuracy = api.evaluate(target, data, limit=limit, on_batch=progress)
    if runs_in_onnx and saturation_risk(cpu_features()):
        terminal.note(
            f"{SATURATES}Measured in its precise mode, as other processors compute; sessions here "
            f'do likewise with the option {PRECISE} = "1".'
        )
    shares = f"top-1 {100 * accuracy.top1:.2f} %, top-5 {100 * accuracy.top5:.2f} %"
    terminal.say(f"{shares} of {accuracy.n}")
    emit(terminal, accuracy.to_dict())


def read_by(target: Model | Path) -> Input | None:
    """What a network reads, a file or an output folder; None if nothing says."""
    if isinstance(target, Model):
        return target.input
    return input_of(load_artifact(target).onnx_path if target.is_dir() else target)


def says_what_it_reads(path: Path) -> bool:
    """Whether an ONNX file says what it reads, so that ONNX Runtime can be fed."""
    return path.exists() and input_of(path) is not None


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
    header = ("network", f"ms {A_NOUN[found.noun]}")
    rows = [["float32", f"{found.float_ms:.2f}"], [scheme, f"{found.int_ms:.2f}"]]
    terminal.table(
        f"ONNX Runtime {found.runtime}, {found.threads} threads, {', '.join(found.features)}",
        header,
        rows,
    )
    if stays_float(scheme):
        terminal.say("both are the float network: nothing in this folder is in integers")
    else:
        terminal.say(f"the integer network is {found.speedup:.2f}x as fast")
    for warning in found.warnings:
        terminal.note(warning)
    emit(terminal, found.to_dict())
