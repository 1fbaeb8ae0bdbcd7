"""Settings in TOML: what a file may say, brought to the form of the command line's flags.

A file says `schema_version = 1` and has a table for each verb, `[synthesize]`, `[quantize]`,
`[train]` and so on, whose keys are the verb's flags without their dashes. `[quantize.reading]` and
the like group them, `[[rules]]` are the rules of `[quantize]` one by one, `[model]` says what the
settings were used for.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfq_jax.base.files import read_regular
from dfq_jax.errors import UsageError, check_choice

SCHEMA_VERSION = 1
LARGEST = 1 << 20
"""Bytes of a file of options."""
VERBS = ("synthesize", "quantize", "train", "compress", "adapt", "distill")
MODEL, RULES, RULE = "model", "rules", "rule"
GROUPS = {"reading": VERBS, "machine": ("synthesize",)}
"""{table in a verb's table: verbs that have it}; its keys are flags as well."""
PLACES = frozenset({"output", "preview", "process", "processes", "force", "config"})
"""Options that say where a result goes, not what it is; a repeated run has its own."""
FRACTIONS = frozenset({"accuracy", "split", "value-aware"})
"""Options that may have a decimal point."""
NUMBERS = {"mean": ",", "std": ",", "size": "x"}
"""Options that may be a list of numbers, and what stands between them on the command line."""


def read_tables(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a file, by verb; flags and values as the command line has them.

    Raises:
      UsageError: for a file that cannot be read or is no TOML, another schema version, unknown
        tables, and values that no flag has.
    """
    return tables(content_of(path), f"config {path}")


def content_of(path: Path) -> dict[str, Any]:
    """What a file says, as it says it, without its schema version.

    Raises:
      UsageError: if it cannot be read, is no TOML, or has another schema version.
    """
    try:
        content = tomllib.loads(read_regular(path, LARGEST).decode())
    except OSError as error:
        raise UsageError(f"config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config {path} is not TOML: {error}") from error
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"config {path} has schema_version {version!r}, this version of dfq reads "
            f"{SCHEMA_VERSION}; write schema_version = {SCHEMA_VERSION} at its top."
        )
    return content


def tables(content: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The tables of verbs, flat, with the rules of the file among those of `quantize`.

    Args:
      content: what a file says.
      where: it stands, for messages.

    Raises:
      UsageError: for unknown tables, and values that no flag has.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, table in content.items():
        check_choice(f"table of {where.removeprefix('config ')}", name, (*VERBS, MODEL, RULES))
        if name in VERBS:
            if not isinstance(table, dict):
                raise UsageError(f"{where}: {name} = {table!r} must be a table, [{name}].")
            found[name] = flat(name, table, where)
    if RULES in content:
        given = found.setdefault("quantize", {})
        given[RULE] = [*flags_listed(given.get(RULE, [])), *rules_of(content[RULES], where)]
    return found


def flat(verb: str, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The flags of a verb's table.

    Raises:
      UsageError: naming a value that no flag has.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        if verb in GROUPS.get(key, ()) and isinstance(value, dict):
            found |= flat(verb, value, where)
        elif (verb, key) != ("quantize", RULES):
            found[key] = flag_value(verb, key, value, where)
    if verb == "quantize" and RULES in table:
        found[RULE] = [*flags_listed(found.get(RULE, [])), *rules_of(table[RULES], where)]
    return found


def flags_listed(value: Any) -> list[Any]:
    """A flag that may be repeated, as a list."""
    return value if isinstance(value, list) else [value]


def flag_value(verb: str, key: str, value: Any, where: str) -> Any:
    """A value as the command line has it.

    Raises:
      UsageError: if it has none such.
    """
    plain = key.replace("_", "-")
    if plain in NUMBERS and (isinstance(value, float) or is_list_of(value, (int, float))):
        return NUMBERS[plain].join(map(repr, flags_listed(value)))
    known = str | int | (float if plain in FRACTIONS else int)
    if isinstance(value, known) or is_list_of(value, (str,)):
        return value
    raise UsageError(
        f"{where}: {key} = {value!r} in [{verb}] must be text in quotes, a whole number, true or "
        "false, or a list of texts where a flag is repeated."
    )


def is_list_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value is a list of texts, or of numbers."""
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def rules_of(entries: Any, where: str) -> list[str]:
    """Tables of `[[rules]]` as `--rule` is written.

    Raises:
      UsageError: naming an entry that is none.
    """
    if not isinstance(entries, list):
        raise UsageError(f"{where}: {RULES} = {entries!r} must be tables, [[{RULES}]].")
    return [entry if isinstance(entry, str) else rule_text(entry, where) for entry in entries]


def rule_text(entry: Any, where: str) -> str:
    """One rule, e.g. `{pattern = "layer3.*", bits = 8}`, as `--rule` is written.

    Raises:
      UsageError: if it is none.
    """
    parts = entry if isinstance(entry, dict) else {}
    given = {str(key).replace("-", "_"): value for key, value in parts.items()}
    pattern, bits = given.pop("pattern", None), bits_text(given)
    if not isinstance(pattern, str) or bits is None:
        raise UsageError(
            f'{where}: {entry!r} is no rule: write pattern = "layer3.*" and bits = 8 (or "w4a8", '
            '"float"), or weight_bits and input_bits, or keep_float = true.'
        )
    return f"{pattern}={bits}"


def bits_text(given: Mapping[str, Any]) -> str | None:
    """The bits of a rule as `--rule` is written; None if it names none, or names them twice."""
    match given:
        case {"bits": int() | str() as bits, **rest} if not rest and not isinstance(bits, bool):
            return str(bits)
        case {"keep_float": True, **rest} if not rest:
            return "float"
        case {"weight_bits": int() as w, "input_bits": int() as a, **rest} if not rest:
            return f"w{w}a{a}"
        case {"weight_bits": int() as w, **rest} if not rest:
            return f"w{w}"
        case {"input_bits": int() as a, **rest} if not rest:
            return f"a{a}"
        case _:
            return None
