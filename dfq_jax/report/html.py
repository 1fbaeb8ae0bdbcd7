"""The report as one HTML file that opens anywhere."""

import base64
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment

from dfq_jax.examples import Examples
from dfq_jax.pruning.prune import Pruned
from dfq_jax.pruning.sparse import Zeros
from dfq_jax.report.analyze import Report
from dfq_jax.report.console import one_line
from dfq_jax.report.decibels import decibel_cell, in_decibels
from dfq_jax.report.grid import grid_png
from dfq_jax.report.plots import costs_png
from dfq_jax.report.shapes import pruned_line, zeros_line
from dfq_jax.report.summary import worst_layers
from dfq_jax.report.terminal import compared
from dfq_jax.report.trust import trust_words
from dfq_jax.types import Input, InputContract

MOST_SHOWN = 64
PIXELS_SHOWN = 1 << 20
"""Images in a report, and their pixels: 64 of 224 pixels would be 11 MB."""
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>dfq report</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right}
td:first-child,th:first-child{text-align:left}td:first-child,.facts td{overflow-wrap:anywhere}
th{border-bottom:2px solid #888}
tr:nth-child(even) td{background:#f4f4f4}.bad{color:#b00020;font-weight:600}.ok{color:#0a7d33}
img{max-width:100%;height:auto;border:1px solid #ccc}.wide{overflow-x:auto}
@media(max-width:40rem){body{margin:1rem auto}td,th{padding:.2rem .4rem}
.wide td:first-child{min-width:8rem}}
</style>
<h1>Quantization report{% if title %}: {{ title }}{% endif %}</h1>
<p class="{{ 'ok' if report.passed else 'bad' }}">
{% if report.failure %}FAILED: {{ report.failure }}.{% endif %}
{% if report.passed and report.estimate %}{{ expected }}.
{% elif report.passed %}{{ compared }}.{% endif %}</p>
{% if report.confidence == 'low' %}<p class="bad">Low confidence in these numbers.</p>{% endif %}
{% for note in report.notes %}<p>Note: {{ note }}.</p>{% endfor %}
<table class="facts">
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
<p>{% if report.estimate %}The expected loss is an estimate from noise on images made from the
network and a model of the margins of real ones; nine of ten losses that 1,000 labelled images show
lie in its interval. A network fails that is expected to lose more than half of its accuracy.
{% endif %}Agreement and SQNR are measured on {{ 'the ' ~ rows ~ ' given, of which labels are not
known' if report.given else rows ~ ' made for the network' }}. They tell a broken
result from a sound one; they are not an accuracy on real data.</p>
{% if report.outputs %}<h2>Outputs</h2>
<p>Each part of every output against the float network's, before a final softmax or sigmoid and as
it is returned.</p>
<div class="wide"><table><tr><th>output</th><th>judged as</th><th>SQNR dB</th><th>returned</th>
<th>agreement</th><th></th></tr>
{% for x in report.outputs %}<tr><td>{{ x.name }}</td><td>{{ x.kind }}</td>
<td>{{ x.sqnr|decibels }}</td><td>{{ x.shown|decibels }}</td>
<td>{{ '' if x.agreement is none else '%.1f %%' % (100 * x.agreement) }}</td>
<td class="{{ 'bad' if x.fault else 'ok' }}">{{ x.fault or 'sound' }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if front %}<h2>Bits {{ 'and channels ' if together else '' }}within the budget</h2>
<img alt="loss against size" src="data:image/png;base64,{{ front }}">{% endif %}
<h2>Layers</h2>
<p>{{ order }} first; the last column is the place in the network.</p>
<div class="wide"><table>
<tr><th>layer</th><th>operator</th><th>weight bits</th><th>input bits</th><th>MACs</th>
<th>weights</th><th>SQNR dB</th><th>in float because</th><th>place</th></tr>
{% for place, x in layers %}<tr><td>{{ x.name }}</td><td>{{ x.kind }}</td>
<td>{{ x.weight_bits or 'float' }}</td><td>{{ x.input_bits or 'float' }}</td>
<td>{{ '{:,}'.format(x.macs) }}</td><td>{{ '{:,}'.format(x.params) }}</td>
<td>{{ x.sqnr|decibels }}</td><td>{{ x.reason }}</td><td>{{ place }}</td></tr>{% endfor %}
</table></div>
{% if pruned %}<h2>Channels</h2>
<p>{{ smaller|capitalize }}. Losses are those against the network as it was.</p>
{% for note in pruned.notes %}<p>Note: {{ note }}.</p>{% endfor %}
<div class="wide"><table><tr><th>layer</th><th>channels made</th><th>channels read</th>
<th>MACs before</th><th>after</th><th>all stay because</th></tr>
{% for x in pruned.layers %}<tr><td>{{ x.name }}</td><td>{{ x }}</td>
<td>{{ x.inputs[0] }} -&gt; {{ x.inputs[1] }}</td><td>{{ '{:,}'.format(x.macs[0]) }}</td>
<td>{{ '{:,}'.format(x.macs[1]) }}</td><td>{{ pruned.left.get(x.name, '') }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if zeros %}<h2>Weights at zero</h2>
<p>{{ sparse|capitalize }}. Losses are those against the network as it was.</p>
<div class="wide"><table><tr><th>layer</th><th>weights</th><th>zero</th>
<th>once quantized</th></tr>
{% for x in zeros.layers %}<tr><td>{{ x.name }}</td><td>{{ '{:,}'.format(x.weights) }}</td>
<td>{{ '{:,}'.format(x.before) }}</td><td>{{ '{:,}'.format(x.after) }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if histograms %}<h2>Weights on their grids</h2>
<p>How often a code occurs, in the first of these layers; counts are logarithmic.</p>
<img alt="codes of kernels" src="data:image/png;base64,{{ histograms }}">{% endif %}
{% if costs %}<h2>What each layer costs</h2>
<p>On the left the error of the network's output with only this layer quantized; on the right the
error that has gathered in a layer's own output. <code>dfq doctor</code> computes what would
help.</p>
<img alt="errors by layer" src="data:image/png;base64,{{ costs }}">{% endif %}
{% if report.shared_grids %}<h2>Unequal parts on one grid</h2>
<p>What these tensors keep on the grid that they share with larger ones, and would on their own.</p>
<div class="wide"><table><tr><th>tensor</th><th>on the grid of</th>
<th>SQNR dB</th><th>on its own</th></tr>
{% for x in report.shared_grids %}<tr><td>{{ x.part }}</td><td>{{ x.tensor }}</td>
<td>{{ x.shared_db|decibels }}</td><td>{{ x.own_db|decibels }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if report.units %}<h2>Learned rounding</h2>
<p>The error of each piece of the network, rounded as it came and with what was learned.</p>
<div class="wide"><table><tr><th>unit</th><th>method</th><th>before</th><th>after</th>
<th></th><th>s</th></tr>
{% for x in report.units %}<tr><td>{{ x.name }}</td><td>{{ x.method }}</td>
<td>{{ '%.4g' % x.before }}</td><td>{{ '%.4g' % x.after }}</td>
<td>{{ '' if x.kept else 'left as it was' }}</td><td>{{ '%.1f' % x.seconds }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if grid %}{% set shown = 'Images given' if report.given else 'Synthesized images' %}
<h2>{{ shown }}</h2>
<img alt="{{ shown|lower }}" src="data:image/png;base64,{{ grid }}">{% endif %}
</html>
"""


class Making(NamedTuple):
    """What a page shows of what became of a network before it was judged.

    Attributes:
      pictures: PNGs by name: `front` of allocations of bits, `histograms` of codes.
      pruned: how the network got smaller before, if it did.
      zeros: which weights were made zero before, if some were.
      together: whether a front is one of bits and channels.
    """

    pictures: Mapping[str, bytes] = MappingProxyType({})
    pruned: Pruned | None = None
    zeros: Zeros | None = None
    together: bool = False


AS_IT_CAME = Making()


def report_html(
    report: Report,
    images: Examples,
    settings: Mapping[str, Any],
    verification: Mapping[str, Any] | None = None,
    *,
    about: Mapping[str, object] = MappingProxyType({}),
    making: Making = AS_IT_CAME,
) -> bytes:
    """The report as a page; every name that comes from the network is escaped.

    Args:
      report: how far the result can be trusted.
      images: what it was calibrated and judged with.
      settings: the resolved configuration.
      verification: what the comparison with ONNX Runtime found, as plain data.
      about: what it is a report of: the file and its hash, the date, bytes; shown first.
      making: what became of the network on the way.

    Returns:
      UTF-8 HTML with everything inside.
    """
    facts = [*about.items(), *facts_of(report, images.input, settings, verification)]
    shown = lambda value: one_line(value) if isinstance(value, str) else value
    made = Environment(autoescape=True, finalize=shown)
    made.filters["decibels"] = decibel_cell
    page = made.from_string(TEMPLATE)
    costs = costs_png(report.costs) if report.costs else b""
    drawn = {"grid": shown_images(images), "costs": costs, **making.pictures}
    told = [] if report.estimate is None else [x.strip() for x in trust_words(report.estimate)]
    told_as_compared = compared(report)
    return page.render(
        report=report,
        together=making.together,
        facts=facts,
        title=about.get("model", ""),
        compared=f"{told_as_compared[:1].upper()}{told_as_compared[1:]}",
        rows="rows" if report.rows else "images",
        expected="; ".join(told).capitalize(),
        layers=worst_layers(report),
        pruned=making.pruned,
        smaller="" if making.pruned is None else pruned_line(making.pruned),
        zeros=making.zeros,
        sparse="" if making.zeros is None else zeros_line(making.zeros),
        order="Those that cost most" if report.costs else "The least faithful outputs",
        **{name: base64.b64encode(data).decode() for name, data in drawn.items()},
    ).encode()


def shown_images(images: Examples) -> bytes:
    """A PNG of a few images; empty for examples of anything else."""
    read = images.input
    if not isinstance(read, InputContract):
        return b""
    few = max(1, min(MOST_SHOWN, PIXELS_SHOWN // (read.height * read.width)))
    return grid_png(images, most=few)


def facts_of_input(read: Input) -> list[tuple[str, object]]:
    """What the network reads, for the table at the top."""
    if not isinstance(read, InputContract):
        return [("input", str(read))]
    return [
        ("input", f"{read.height} x {read.width}, {read.colours}"),
        ("normalisation", read.normalised),
    ]


def facts_of(
    report: Report,
    read: Input,
    settings: Mapping[str, Any],
    verification: Mapping[str, Any] | None,
) -> list[tuple[str, object]]:
    """Names and values of the table at the top."""
    facts: list[tuple[str, object]] = [
        *facts_of_input(read),
        ("integer share of multiply-accumulates", f"{100 * report.coverage:.1f} %"),
        ("average bits a weight", f"{report.average_bits:.2f}"),
        ("SQNR of the output", in_decibels(report.sqnr)),
        *settings.items(),
    ]
    if report.estimate is not None:
        agreed = f"{100 * report.agreement:.1f} % of {report.images} {report.held_out}"
        facts.append(("agreement with the float network", agreed))
    facts += [(f"{kind.count} {kind.kind}", f"in float: {kind.reason}") for kind in report.in_float]
    if verification is not None:
        steps = f"{verification['most_steps']} step{'s' * (verification['most_steps'] != 1)}"
        facts.append((f"largest difference to {verification['runner']}", steps))
    if verification is not None and report.classes:
        same = f"{100 * verification['agreement']:.1f} %"
        facts.append((f"same decisions as {verification['runner']}", same))
    return facts
