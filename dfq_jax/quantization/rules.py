"""Rules as people write them: `layer3.*=8`, `head=w8a4`, `*.fc=a8`, `*=w4g64`, `stem=float`."""

import re

from dfq_jax.errors import PlanError
from dfq_jax.quantization.plan import Rule, check_rule, of_edges, shared, sharing_of

FORMS = "PATTERN=8, =w8, =a8, =w4a8, =w4g64, =w8t or =float"
ASKED = r"(?P<both>\d+)|(?:w(?P<w>\d+)(?P<share>t|c|g\d+)?)?(?:a(?P<a>\d+))?"


def written(rule: Rule) -> str:
    """A rule as `parse_rule` reads it."""
    if rule.keep_float:
        return f"{rule.pattern}=float"
    bits = f"w{rule.weight_bits}" if rule.weight_bits else ""
    sharing = "c" if rule.sharing == "channel" else shared(rule.sharing or "channel")
    return f"{rule.pattern}={bits}{sharing}{of_edges(rule.input_bits)}"


def parse_rule(text: str) -> Rule:
    """Reads a rule: a glob over names of layers, an equals sign, and bits.

    Args:
      text: `PATTERN=8` gives kernel and input 8 bits, `=w8` the kernel, `=a8` the input, `=w4a8`
        each its own; `=float` leaves the layer in float. Behind the bits of the kernel, `g64` gives
        groups of 64 input channels a scale each, `t` the whole kernel one, `c` each output channel.

    Raises:
      PlanError: if it is none, or asks for bits that there are none of.
    """
    pattern, _, asked = text.rpartition("=")
    pattern, asked = pattern.strip(), asked.strip().lower()
    found = re.fullmatch(ASKED, asked)
    if not pattern or not asked or (found is None and asked != "float"):
        raise PlanError(f"rule {text!r} is none: write {FORMS}, e.g. 'layer3.*=8'.")
    if found is None:
        return Rule(pattern, keep_float=True)
    bits = lambda group: None if (n := found["both"] or found[group]) is None else int(n)
    sharing = sharing_of(found["share"])
    rule = Rule(pattern, weight_bits=bits("w"), input_bits=bits("a"), sharing=sharing)
    check_rule(rule)
    return rule
