"""What `dfq doctor` does: which layers cost most, what would help, and what to type."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Shaped

from dfq_jax.allocation.diagnosis import Diagnosis, Outcome
from dfq_jax.api.functions import probes_of
from dfq_jax.api.quantize import quantize
from dfq_jax.base.files import read_regular, write_atomically
from dfq_jax.cli.claims import check_apart, check_picture
from dfq_jax.cli.config import CONFIG, LARGEST
from dfq_jax.cli.delivery import emit
from dfq_jax.cli.options import DoctorOptions
from dfq_jax.cli.verbs import read_model
from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task, noun_of
from dfq_jax.io.artifacts.artifact import Artifact, load_artifact
from dfq_jax.io.load import CARRIED, ReadOptions, load
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.quantization.rules import parse_rule
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.diagnose import diagnose, reference_of
from dfq_jax.recipes.untried import Untried, other_presets, to_dicts, within_budget
from dfq_jax.report.console import Terminal
from dfq_jax.report.diagnosis import (
    COST_HEADER,
    FEW_RULES,
    INDENT,
    REMEDY_HEADER,
    advice,
    columns,
    command_lines,
    cost_rows,
    in_lines,
    options_of,
    recommended,
    remedy_rows,
    to_dict,
)
from dfq_jax.report.plots import costs_png
from dfq_jax.types import InputContract, TokenColumns, Tokens


class Patient(NamedTuple):
    """A quantized network with what is known of it.

    Attributes:
      title: what it is, in words.
      quantized: the network.
      float_model: what it was made from, batch norms in place.
      probes: images, normalised, or rows to judge it by.
      so_far: {layer: SQNR of its output in dB, errors before it included}.
      bytes: of its file.
      command: that makes it again, into another folder.
      rules: that the command has.
      preset: that made it.
      made: provenance of its images.
      budgeted: whether its bits were chosen within a budget.
      task: what it is for; None for what its graph says.
    """

    title: str
    quantized: QuantizedModel
    float_model: Model
    probes: Shaped[Array, "n ..."]
    so_far: dict[str, float]
    bytes: int
    command: tuple[str, ...]
    rules: tuple[str, ...]
    preset: str
    made: Mapping[str, Any]
    budgeted: bool = False
    task: Task | None = None


def doctor(target: str, options: DoctorOptions, terminal: Terminal) -> None:
    """`dfq doctor`."""
    if options.top < 1:
        raise UsageError(f"--top {options.top}: show at least one layer.")
    chart = options.chart
    check_apart(MODEL=target, chart=chart)
    if chart is not None:
        check_picture(chart, "--chart")
    folder = Path(target)
    of = of_folder(folder, terminal) if folder.is_dir() else of_model(target, options, terminal)
    reference = reference_of(of.float_model, of.quantized, of.probes)
    given = (of.quantized, of.probes, of.so_far)
    found = diagnose(reference, *given, task=of.task, watch=terminal.watcher)
    if chart is not None:
        write_atomically(chart, costs_png(found.costs))
    rest = untried_for(of, reference, found)
    show(of, found, rest, options.top, terminal)
    told = {"target": target, "title": of.title, **to_dict(found, of.bytes, of.command, of.rules)}
    emit(terminal, {**told, "untried": to_dicts(rest), "seconds": terminal.elapsed})


def untried_for(of: Patient, reference: Model, found: Diagnosis) -> tuple[Untried, ...]:
    """What could help and is not computed."""
    plan, read = of.quantized.plan, of.quantized.model.input
    image = isinstance(read, InputContract)
    others = other_presets(of.preset, read, plan.scheme, of.made) if image else ()
    count = of.made.get("n", 0)
    images = count if isinstance(count, int) else 0
    budget = None if of.budgeted else within_budget(reference, plan, found, images)
    return others if budget is None else (*others, budget)


def of_folder(folder: Path, terminal: Terminal) -> Patient:
    """The network in an output folder, failed or not."""
    terminal.stage(f"reading {folder}")
    artifact = load_artifact(folder)
    read = artifact.quantized.model.input
    size = read.length if isinstance(read, Tokens | TokenColumns) else None
    model = load(artifact.float_path, size=size, no_bn_fallback=True, unchecked=True).model
    facts, report = artifact.manifest, artifact.manifest["report"]
    failed = ", FAILED" if artifact.failed else ""
    command, rules = command_of(artifact)
    return Patient(
        f"{folder}: {facts.get('scheme')}, preset {facts.get('preset')}, "
        f"layers {facts.get('layers')}{failed}",
        artifact.quantized,
        dataclasses.replace(model, inputs=(read,)),
        probes_of(artifact),
        losses_in(report),
        artifact.onnx_path.stat().st_size,
        command,
        rules,
        str(facts.get("preset")),
        table_in(facts, "images"),
        "budget" in table_in(report, "settings"),
        artifact.task,
    )


def table_in(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of a manifest; empty where there is none."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def losses_in(report: Mapping[str, Any]) -> dict[str, float]:
    """{layer: SQNR of its output} as a report tells them; empty where it does not."""
    rows = report.get("layers")
    told = [x for x in rows if isinstance(x, dict)] if isinstance(rows, list) else []
    return {str(x["name"]): x["sqnr"] for x in told if isinstance(x.get("sqnr"), float)}


def command_of(artifact: Artifact) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command that makes the network of a folder again, and the rules that it has."""
    facts, folder = artifact.manifest, artifact.folder
    source = table_in(facts, "source")
    name, settings = source.get("name", "MODEL"), settings_in(folder)
    if "arch" not in settings and source.get("architecture") in CARRIED:
        name = source["architecture"]
    begin, end = ("dfq", "quantize", name), ("-o", str(folder.with_name(f"{folder.name}-better")))
    if settings:
        return (*begin, "--config", str(folder / CONFIG), *end), tuple(settings.get("rule", ()))
    keys = ("scheme", "preset", "layers")
    told = [word for key in keys if facts.get(key) for word in (f"--{key}", str(facts[key]))]
    return (*begin, *told, *end), ()


def settings_in(folder: Path) -> dict[str, Any]:
    """What the folder's `config.toml` says; empty without one."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(read_regular(path, LARGEST).decode()).get("quantize", {})
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Delete it to go on without.") from error
    return table if isinstance(table, dict) else {}


def of_model(target: str, options: DoctorOptions, terminal: Terminal) -> Patient:
    """A network, quantized in simulation with the preset `fast`."""
    parse_scheme(options.scheme)
    rules = [parse_rule(text) for text in options.rule]
    loaded = read_model(target, options.reading, terminal)
    with terminal.progress():
        result = quantize(
            loaded.model,
            scheme=options.scheme,
            layers=options.layers,
            rules=rules,
            seed=options.seed,
            watch=terminal.watcher,
        )
    return Patient(
        f"{loaded.architecture} {options.scheme}, preset fast, layers {options.layers}",
        result.quantized,
        result.float_model,
        result.probes.array,
        {layer.name: layer.sqnr for layer in result.report.layers},
        len(serialize(quantized_onnx(result.quantized))),
        command_for(target, options),
        options.rule,
        "fast",
        result.images.provenance,
    )


def command_for(target: str, options: DoctorOptions) -> tuple[str, ...]:
    """The command that quantizes a network as the doctor did."""
    words = ["dfq", "quantize", target]
    for field in dataclasses.fields(ReadOptions):
        value = getattr(options.reading, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        words += [] if value in (None, False) else [flag] if value is True else [flag, str(value)]
    words += ["--scheme", options.scheme, "--layers", options.layers]
    words += ["--seed", str(options.seed)] if options.seed else []
    return (*words, "-o", "out")


def show(
    of: Patient, found: Diagnosis, rest: Sequence[Untried], top: int, terminal: Terminal
) -> None:
    """What a person reads."""
    for line in [*in_lines(of.title), ""]:
        terminal.say(line)
    for line in in_lines(
        "What each layer costs, the worst first: the SQNR of the network's output with only this "
        "layer quantized, and of the layer's own output with all before it quantized too."
    ):
        terminal.say(line)
    terminal.say("")
    for line in columns(COST_HEADER, cost_rows(found.costs, top)):
        terminal.say(line)
    if (more := len(found.costs) - top) > 0:
        terminal.say(f"{more} more cost less (--top {len(found.costs)} shows all)")
    terminal.say("")
    on = f"{found.images} {noun_of(of.float_model.inputs[0])}s"
    terminal.say(f"What would help, simulated on {on} (s: to find out):")
    terminal.say("")
    for line in columns(REMEDY_HEADER, remedy_rows(found, of.bytes)):
        terminal.say(line)
    terminal.say("")
    best = recommended(found, of.bytes)
    for line in [*in_lines(advice(found.now, best)), *typed(of, found, best), *untried_lines(rest)]:
        terminal.say(line)


def untried_lines(rest: Sequence[Untried]) -> list[str]:
    """What was not computed, and what it takes."""
    lines = ["", "Not computed, since more has to be made first:"] if rest else []
    for x in rest:
        lines += in_lines(f"{' '.join(x.options)}: {x.takes}", hanging=INDENT)
    return lines


def typed(of: Patient, found: Diagnosis, best: Outcome | None) -> list[str]:
    """What to type for the remedies, the best of them first."""
    lines = [] if best is None else command_lines([*of.command, *options_of(best, of.rules)])
    others = [x for x in found.outcomes if x is not best]
    short = [x for x in others if len(options_of(x, of.rules)) <= 2 * FEW_RULES]
    if short:
        more = "" if len(short) == len(others) else " (longer ones: --json)"
        lines += ["", f"The others, as options of the same command{more}:"]
    for x in short:
        lines += [f"{x.remedy.name}:", *command_lines(options_of(x, of.rules))]
    return lines
