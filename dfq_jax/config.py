"""Options from a TOML file, and the file that repeats a run.

A file says `schema_version = 1` and has a table for each verb, `[synthesize]` and `[quantize]`,
whose keys are the verb's flags without their dashes. A verb reads its own table only, so that one
file describes both steps of a published setting. What the command line says wins.
"""

import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from dfq_jax.errors import UsageError, check_choice
from dfq_jax.files import read_regular

CONFIG = "config.toml"
"""Beside the result: what `--config` needs to make it again."""
SCHEMA_VERSION = 1
LARGEST = 1 << 20
"""Bytes of a file of options."""
VERBS = ("synthesize", "quantize")
FRACTIONS = frozenset({"accuracy"})
"""Options that may have a decimal point."""
PLACES = frozenset({"output", "preview", "process", "processes", "force", "config"})
"""Options that say where a result goes, not what it is; a repeated run has its own."""


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills in what the `--config` file says and the command line does not; for `App.config`.

    Raises:
      UsageError: as `read` does, or for a file that says nothing about this verb.
      CycloptsError: naming a key that is no option, or a value of another type.
    """
    given = next((a for a in arguments if "--config" in a.names and a.tokens), None)
    if given is None:
        return
    path = Path(given.tokens[-1].value)
    tables, verb = read(path), commands[-1]
    if verb not in tables:
        others = f", only {', '.join(f'[{name}]' for name in tables)}" if tables else ""
        raise UsageError(f"--config {path} has no table [{verb}]{others}.")
    Dict(tables, source=str(path))(app, commands, arguments)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a file, by verb.

    Raises:
      UsageError: for a file that cannot be read or is no TOML, another schema version, unknown
        tables, and values that are neither text, lists of text, whole numbers, nor true or false.
    """
    try:
        content = tomllib.loads(read_regular(path, LARGEST).decode())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"--config {path} has schema_version {version!r}, this version of dfq reads "
            f"{SCHEMA_VERSION}; write schema_version = {SCHEMA_VERSION} at its top."
        )
    for name, table in content.items():
        check_choice(f"table of {path}", name, VERBS)
        if not isinstance(table, dict):
            raise UsageError(f"--config {path}: {name} = {table!r} must be a table, [{name}].")
        for key, value in table.items():
            known = str | int | (float if key in FRACTIONS else int)
            if not (isinstance(value, known) or is_text_list(value)):
                raise UsageError(
                    f"--config {path}: {key} = {value!r} in [{name}] must be text in quotes, a "
                    "whole number, true or false, or a list of texts where a flag is repeated."
                )
    return content


def is_text_list(value: Any) -> bool:
    """Whether a value is what a flag that can be repeated has in a file."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def settings_toml(verb: str, options: Any) -> bytes:
    """The file with which `dfq VERB MODEL -o OUTPUT --config FILE` makes the same again.

    Args:
      verb: one of `VERBS`.
      options: its options, as a dataclass; those left to the program are left out.
    """
    values = {k: v for k, v in settings(options) if v not in (None, ()) and k not in PLACES}
    return tomli_w.dumps({"schema_version": SCHEMA_VERSION, verb: values}).encode()


def settings(options: Any) -> Iterator[tuple[str, Any]]:
    """Flags without dashes and their values, those of nested groups among them."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value)
        else:
            name = field.name.replace("_", "-")
            yield name, str(value) if isinstance(value, Path) else value
