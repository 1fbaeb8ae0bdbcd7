"""What `dfq synthesize` does, between parsed arguments and the Python API."""

from pathlib import Path

from dfq_jax.api import synthesize as imaging
from dfq_jax.base.files import write_atomically
from dfq_jax.base.machine import MachineOptions
from dfq_jax.base.parallel import Machine
from dfq_jax.cli.claims import (
    check_apart,
    check_images_file,
    check_images_folder,
    check_picture,
    check_state,
    claimed,
    remove_state,
    state_folder,
)
from dfq_jax.cli.config import CONFIG, settings_toml
from dfq_jax.cli.delivery import emit
from dfq_jax.cli.options import SynthesizeOptions
from dfq_jax.cli.verbs import read_model, source_of
from dfq_jax.errors import UsageError
from dfq_jax.io.artifacts.images import load_images, save_images
from dfq_jax.io.load import Loaded
from dfq_jax.recipes.foresight import phase_of_synthesis
from dfq_jax.recipes.presets import budget_of_method
from dfq_jax.report.console import Terminal
from dfq_jax.report.grid import grid_png
from dfq_jax.report.terminal import duration_line
from dfq_jax.synthesis.run.memory import bytes_from


def synthesize_to(model: str, options: SynthesizeOptions, terminal: Terminal) -> None:
    """`dfq synthesize`."""
    output, preview = options.output, options.preview
    single, machine = check_output(output, options.machine), machine_of(options.machine)
    check_apart(MODEL=model, output=output, preview=preview)
    if preview is not None:
        check_picture(preview, "--preview")
    if single:
        check_images_file(output)
        with claimed(output) as state:
            loaded = read_model(model, options.reading, terminal)
            fill_file(loaded, options, machine, state, terminal)
    else:
        check_images_folder(output)
        check_state(state_folder(output))
        fill_folder(read_model(model, options.reading, terminal), options, machine, terminal)


def machine_of(options: MachineOptions) -> Machine:
    """The machine that flags describe.

    Raises:
      UsageError: for a memory that is no number of bytes.
    """
    memory = None if options.memory is None else bytes_from(options.memory)
    return Machine(
        devices=options.devices,
        together=options.together,
        dtype=options.dtype,
        remat=options.remat,
        memory=memory,
        process=options.process,
        processes=options.processes,
    )


def fill_file(
    loaded: Loaded, options: SynthesizeOptions, machine: Machine, state: Path, terminal: Terminal
) -> None:
    """Makes images and writes them into one file."""
    n, output = count_of(loaded, options), options.output
    with terminal.progress():
        terminal.phase(phase_of_synthesis(loaded.model, options.method, n, options.steps))
        images = imaging.synthesize(
            loaded.model,
            options.method,
            n,
            seed=options.seed,
            steps=options.steps,
            batch=options.batch,
            machine=machine,
            watch=terminal.watcher,
            state_folder=state,
        )
    save_images(output, images)
    repeated = settings_toml("synthesize", options, source_of(loaded))
    write_atomically(output.with_name(f"{output.name}.toml"), repeated)
    if options.preview is not None:
        write_atomically(options.preview, grid_png(images))
    remove_state(state)
    made = images.provenance
    for note in made.get("notes", ()):
        terminal.note(f"note: {note}")
    terminal.say(f"{n} images by {made['method']} {duration_line(made)}: {output}")
    emit(terminal, {"images": str(output), "n": n, "provenance": dict(made)})


def fill_folder(
    loaded: Loaded, options: SynthesizeOptions, machine: Machine, terminal: Terminal
) -> None:
    """Makes images, or the share of this process in them, and writes them into a folder."""
    n, output = count_of(loaded, options), options.output
    state = state_folder(output)
    with terminal.progress():
        terminal.phase(phase_of_synthesis(loaded.model, options.method, n, options.steps))
        made = imaging.synthesize_set(
            loaded.model,
            n,
            output,
            method=options.method,
            seed=options.seed,
            steps=options.steps,
            batch=options.batch,
            machine=machine,
            watch=terminal.watcher,
        )
    if made.complete:
        repeated = settings_toml("synthesize", options, source_of(loaded))
        write_atomically(output / CONFIG, repeated)
    if made.complete and options.preview is not None:
        write_atomically(options.preview, grid_png(load_images(output)))
    if made.complete and not any(state.glob("*.lock")):
        remove_state(state)
    for note in made.notes:
        terminal.note(f"note: {note}")
    whole = f"{n} images" if made.complete else f"one share of {n} images"
    terminal.say(f"{whole} by {made.method} {duration_line(made._asdict())}: {output}")
    if not made.complete:
        terminal.note("the set is not finished: other processes have shards to make")
    emit(terminal, {"images": str(output), "n": n, **made._asdict()})


def count_of(loaded: Loaded, options: SynthesizeOptions) -> int:
    """How many images are made: as many as asked for, or as are the method's own."""
    if options.n is None:
        return budget_of_method(options.method, loaded.model).n
    return options.n


def check_output(output: Path, machine: MachineOptions) -> bool:
    """Whether images go into one file; else they go into a folder of shards.

    Raises:
      UsageError: for a path that can be neither, or several processes and one file.
    """
    single = output.suffix == ".npz" and not output.is_dir()
    folder = output.is_dir() or (not output.suffix and not output.exists())
    if not (single or folder) or not output.absolute().parent.is_dir():
        raise UsageError(
            f"-o {output}: give a .npz file in an existing folder, or for a set of many files a "
            "name without a suffix."
        )
    if single and (machine.process is not None or machine.processes is not None):
        raise UsageError(
            f"-o {output}: several processes (--process, --processes) fill a folder; give a name "
            "without a suffix."
        )
    return single
