"""What `dfq quantize` and `dfq train` do with a result: verify, time, save, show, and judge it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dfq_jax.api.result import PROBE, Result
from dfq_jax.cli.claims import remove_state, state_folder
from dfq_jax.cli.config import CONFIG
from dfq_jax.cli.sizes import size_line, speed_lines, timed
from dfq_jax.errors import DataError, DfqError, QualityError
from dfq_jax.graph.tasks import Noun, noun_of
from dfq_jax.io.runtime.latency import Latency
from dfq_jax.io.verification.verify import Verification
from dfq_jax.recipes.joint import JointAllocation, JointPoint
from dfq_jax.report.analyze import Report
from dfq_jax.report.console import Terminal
from dfq_jax.report.plots import BITS_HEADER, FRONT_HEADER, bit_rows, front_rows
from dfq_jax.report.shapes import SHAPE_HEADER, lost_lines, shape_rows, whole_lines
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
from dfq_jax.types import NHWC, Input, InputContract

JOINT_HEADER = ("", "bytes", "predicted loss", "channels left", "bits of weights")


def emit(terminal: Terminal, data: dict[str, Any]) -> None:
    """Prints the JSON object of a `--json` run."""
    if terminal.quiet:
        print(json.dumps(data, allow_nan=False))


def contract_line(contract: Input) -> str:
    """What a network reads, in words."""
    if not isinstance(contract, InputContract):
        return f"input {contract}"
    beyond = "" if contract.is_picture else "; cut off beyond that, unless --images goes further"
    assumed = f" (assumed: the file does not say{beyond})" if contract.assumed else ""
    where = f"; files read {contract.layout}" if contract.layout == NHWC else ""
    return (
        f"input {contract.height}x{contract.width} {contract.colours}, {contract.normalised}"
        f"{assumed}{where}"
    )


class Verified(NamedTuple):
    """What was found out about the file of a result.

    Attributes:
      found: by comparing it with what runs it.
      latency: by timing it; None where it could not be.
    """

    found: "Checked"
    latency: Latency | None


def checked_and_timed(result: Result, terminal: Terminal) -> Verified:
    """Compares and times a result; whatever goes wrong there, it is kept.

    One that stays in float has nothing to be compared with in time.
    """
    found = checked(result, terminal)
    floats = not result.quantized.plan.entries
    return Verified(found, None if floats else timed(result.time, terminal))


class Delivery(NamedTuple):
    """Where a result goes.

    Attributes:
      output: folder.
      force: also write beside files of others.
      source: of the weights.
      config: what repeats the run.
    """

    output: Path
    force: bool
    source: Mapping[str, str]
    config: bytes


def deliver(result: Result, verified: Verified, to: Delivery, terminal: Terminal) -> None:
    """Writes a result, says what it is, and fails where it must not be called a success.

    Args:
      result: of `quantize` or `train`.
      verified: what was found out about its file.
      to: where it goes.
      terminal: told.

    Raises:
      QualityError: if the network failed, or its file does.
    """
    output, source = to.output, to.source
    terminal.stage(f"writing {output}")
    found, latency = verified
    manifest = result.save(
        output,
        source=source,
        verification=found.verification,
        latency=latency,
        unverified=found.reason,
        failed=bool(found.fault),
        files={CONFIG: to.config},
        force=to.force,
    )
    remove_state(state_folder(output))
    if result.images.given:
        tell_of_images(output, noun_of(result.input), terminal)
    show_result(result, verified, manifest, source["architecture"], output, terminal)
    if not result.report.passed:
        raise QualityError(
            f"{result.report.failure}: saved as {output / 'model.failed.onnx'}. "
            f"{remedy_line(result.report, output)}"
        )
    if found.fault:
        raise QualityError(
            f"the file did not verify: {found.fault}. Saved as "
            f"{output / 'model.failed.onnx'}. Please report it with the network."
        )


def tell_of_images(output: Path, noun: Noun, terminal: Terminal) -> None:
    """Says which files keep examples that were given."""
    files = f"{PROBE} and report.html keep" if noun == "image" else f"{PROBE} keeps"
    kept = f"{files} some of your {noun}s, to verify and to look at"
    terminal.note(f"{output}: {kept}; leave them out where {noun}s are private")


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


def show_lost(result: Result, terminal: Terminal) -> None:
    """Says what the network lost before it was quantized."""
    if result.pruned is not None:
        terminal.table("channels", SHAPE_HEADER, shape_rows(result.pruned))
        for line in whole_lines(result.pruned):
            terminal.say(line)
    for line in lost_lines(result.pruned, result.zeros):
        terminal.say(line)


def show_result(
    result: Result,
    verified: Verified,
    manifest: dict[str, Any],
    architecture: str,
    output: Path,
    terminal: Terminal,
) -> None:
    """The table and the trust lines at the end."""
    report, plan = result.report, result.quantized.plan
    verification, latency = verified.found.verification, verified.latency
    files = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    model = next(name for name in files if name in ("model.onnx", "model.failed.onnx"))
    before, after = files["float.onnx"], files[model]
    if (mix := result.mixed) is not None:
        rows = bit_rows(mix.space, mix.losses, mix.chosen, mix.uniform)
        terminal.table("bits by layer", BITS_HEADER, rows)
        terminal.table("best allocations", FRONT_HEADER, front_rows(mix.space, mix.front))
    if (both := result.joint) is not None:
        terminal.table("best channels and bits", JOINT_HEADER, joint_rows(both))
    show_lost(result, terminal)
    terminal.table("", LAYER_HEADER, layer_rows(report))
    terminal.say("")
    terminal.say(f"{architecture} {result.settings['scheme']}, layers {plan.layers}")
    terminal.say(coverage_line(report))
    for rest in filter(None, (float_line(report), shared_line(report))):
        terminal.say(rest)
    terminal.say(size_line(before, after, output / model, plan.store))
    for line in speed_lines(latency):
        terminal.say(line)
    terminal.say(contract_line(result.input))
    for line in [*units_lines(report), *trust_lines(report)]:
        terminal.say(line)
    if verification is not None:
        for warning in verification.warnings:
            terminal.note(warning)
        for line in verification_lines(verification):
            terminal.say(line)
    terminal.say(f"{'saved' if model == 'model.onnx' else 'FAILED, kept'}: {output / model}")
    emit(
        terminal,
        {
            "status": manifest["status"],
            "out": str(output),
            "model": str(output / model),
            "scheme": result.settings["scheme"],
            "layers": plan.layers,
            "bytes_float": before,
            "bytes_int": after,
            "store": plan.store,
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
    whose = f"against {found.runner} {found.runtime} on {found.images} {found.noun}s"
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


def joint_rows(found: JointAllocation) -> list[list[str]]:
    """A line for each choice of channels and bits on the front, what was chosen last."""
    whole = sum(count for _, count in found.groups)

    def row(name: str, point: JointPoint) -> list[str]:
        bits = [f"{point.bits.count(b)}x{b}" for b in found.space.bits if b in point.bits]
        left = f"{100 * sum(point.counts) / max(whole, 1):.0f} %"
        return [name, str(point.cost), f"{point.loss:.2e}", left, " ".join(bits)]

    ends = row("uniform", found.uniform), row("chosen", found.chosen)
    return [*(row("", point) for point in found.front), *ends]
