"""Options from a TOML file (see `dfq_jax.base.settings`), and the file that repeats a run.

A verb reads its own table only, so that one file can speak to several. What the command line says
wins.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from dfq_jax.base.settings import (
    LARGEST,
    MODEL,
    PLACES,
    SCHEMA_VERSION,
    VERBS,
    content_of,
    read_tables,
)
from dfq_jax.errors import UsageError

__all__ = ["CONFIG", "LARGEST", "PLACES", "SCHEMA_VERSION", "VERBS", "read_tables"]

CONFIG = "config.toml"
"""Beside the result: what `--config` needs to make it again."""


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills in what the `--config` file says and the command line does not; for `App.config`.

    Raises:
      UsageError: as `read_tables` does, or for a file that says nothing about this verb.
      CycloptsError: naming a key that is no option, or a value of another type.
    """
    given = next((a for a in arguments if "--config" in a.names and a.tokens), None)
    if given is None:
        return
    path = Path(given.tokens[-1].value)
    tables, verb = read_tables(path), commands[-1]
    if verb not in tables:
        others = f", only {', '.join(f'[{name}]' for name in tables)}" if tables else ""
        raise UsageError(f"--config {path} has no table [{verb}]{others}.")
    Dict(tables, source=str(path))(app, commands, arguments)


def settings_toml(verb: str, options: Any, model: Mapping[str, str] | None = None) -> bytes:
    """The file with which `dfq VERB MODEL -o OUTPUT --config FILE` makes the same again.

    Args:
      verb: one of `VERBS`.
      options: its options, as a dataclass; those left to the program are left out.
      model: name and SHA-256 of the file they were used for.
    """
    values = {k: v for k, v in settings(options) if v not in (None, ()) and k not in PLACES}
    told = {} if model is None else {MODEL: dict(model)}
    return tomli_w.dumps({"schema_version": SCHEMA_VERSION, verb: values, **told}).encode()


def other_model(config: Path | None, sha256: str) -> str:
    """What to say where a file of options was made for another model; empty where it was not."""
    told = {} if config is None else content_of(config).get(MODEL, {})
    known = told.get("sha256") if isinstance(told, dict) else None
    if known in (None, sha256):
        return ""
    return f"{config} was made for {told.get('name', 'another model')} (sha256 {known}), not this"


def settings(options: Any) -> Iterator[tuple[str, Any]]:
    """Flags without dashes and their values, those of nested groups among them."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value)
        else:
            name = field.name.replace("_", "-")
            yield name, str(value) if isinstance(value, Path) else value
