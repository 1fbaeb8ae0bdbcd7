import dataclasses
import io
import math
import re
import time

import pytest

from dfq_jax.optim.progress import Progress, RunPhase, UnitReport
from dfq_jax.quantization.shared_grids import SharedGrid
from dfq_jax.report import console as module
from dfq_jax.report.analyze import LayerReport, Report
from dfq_jax.report.console import (
    Log,
    Results,
    Terminal,
    column_lines,
    one_line,
    printable,
    shortened,
    told_apart,
)
from dfq_jax.report.float_kinds import FloatKind
from dfq_jax.report.outputs import OutputReport
from dfq_jax.report.terminal import (
    LAYER_HEADER,
    coverage_line,
    float_line,
    layer_rows,
    shared_line,
    trust_lines,
    units_line,
)
from dfq_jax.report.trust import Estimate

NASTY = "a\x1b[31mb\x9bc\u202ed\r\n[bold]e[/bold] %s\0\x07"


def report(*names, bits: int | None = 8):
    layers = tuple(LayerReport(n, "Conv2d", bits, bits, 100, 50, 30.0) for n in names)
    return Report(layers, 1.0, 4, 30.0, True)


def on_screen(monkeypatch):
    """A terminal whose both streams are coloured screens."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    made, out, log = Terminal(), io.StringIO(), io.StringIO()
    made.out = Results(file=out, force_terminal=True, width=90, color_system="standard")
    made.log = Log(file=log, force_terminal=True, width=90, color_system="standard")
    return made, out, log


def test_sentences_break_between_words_and_code_does_not(monkeypatch):
    made, _, log = on_screen(monkeypatch)
    path = "/" + 9 * "long_folder/"
    code = "  torch.onnx.export(model.eval(), " + 9 * "argument, " + "and one more)"
    made.error(f"{9 * 'some words '}in {path} end. Export it as\n{code}\nor {9 * 'leave it '}")
    made.note("  " + 19 * "a note ")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.getvalue()).splitlines()
    assert code in lines
    assert path in [line.strip() for line in lines]
    others = [line for line in lines if line != code and path not in line]
    assert len(others) == 6
    assert max(map(len, others)) <= 90
    words = {word for line in others for word in line.split()}
    known = ("error:", "some", "words", "in", "end.", "Export", "it", "as", "or", "leave")
    assert words <= {*known, "a", "note"}


def test_a_pipe_gets_every_line_whole(capsys):
    Terminal().error(40 * "word ")
    assert capsys.readouterr().err.count("\n") == 1


def test_control_characters_are_shown_not_obeyed():
    assert printable(NASTY) == ("a\\x1b[31mb\\x9bc\\u202ed\\r\n[bold]e[/bold] %s\\x00\\x07")
    assert printable("größe … 模型") == "größe … 模型"
    assert printable("\udcff") == "\\udcff"
    assert one_line("a\nb") == "a\\nb"


def test_results_and_logs_are_apart(capsys):
    made = Terminal()
    made.say(NASTY)
    made.note(NASTY)
    made.stage("begins")
    made.error(NASTY)
    out, err = capsys.readouterr()
    assert out == printable(NASTY) + "\n"
    lines = err.split("\n")
    assert lines[:2] == printable(NASTY).split("\n")
    assert re.fullmatch(r"\[ {3}0\.\d s\] begins", lines[2])
    assert lines[3].startswith("error: a\\x1b[31mb")


def test_quiet_keeps_stdout_for_the_json(capsys):
    made = Terminal(quiet=True)
    made.say("text")
    made.table("title", ("a",), [["b"]])
    made.note("log")
    assert capsys.readouterr() == ("", "log\n")


def test_long_lines_are_not_broken_in_a_pipe(capsys):
    Terminal().say("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_tables_are_plain_columns_in_a_pipe(capsys):
    Terminal().table("title", ("name", "n"), [["a\nb\x1b", "1,000"], ["c", "2"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["title", "name          n", "a\\nb\\x1b  1,000", "c             2"]


def test_tables_on_a_screen_show_names_as_they_are(monkeypatch):
    made, out, _ = on_screen(monkeypatch)
    made.table("title", ("name", "n"), [[NASTY, "1"], ["c", "2"]])
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert one_line(NASTY) in shown
    assert "\x1b" not in shown
    assert "\r" not in shown


def test_columns():
    assert column_lines([("a", "b"), ("long", "1"), ("x", "100")]) == [
        "a       b",
        "long    1",
        "x     100",
    ]


def test_progress_in_a_pipe_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    made = Terminal()
    with made.progress():
        for step in range(1, 13):
            now[0] += 1
            made.step(Progress(1, 3, step, 20, {"loss": 0.12345, "prior": 2.0}))
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"synthesizing (\d+)/60 steps", line) for line in lines] == [["21"], ["27"]]
    assert lines[0].endswith("steps: loss 0.1235, prior 2")


def test_layers_that_are_solved_are_told_in_a_pipe(capsys):
    made = Terminal()
    with made.progress():
        made.step(Progress(1, 3, 2, 12, {}, "solving", 0.4))
    assert capsys.readouterr().err.endswith("solving unit 2/3 2/12 layers\n")


def test_what_is_left_follows_the_work_that_is_done_not_the_units(monkeypatch):
    """The second of two units takes nine tenths."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    made = Terminal()
    with made.progress():
        made.phase(RunPhase("learning", 1.0, 0.0))
        for batch, step, part in ((0, 5, 0.05), (0, 10, 0.1)):
            now[0] += 5.0
            made.step(Progress(batch, 2, step, 10, {}, "learning", part))
        assert made.outlook is not None
        assert made.outlook.left(now[0]) == pytest.approx(90.0)


def test_progress_on_a_screen_is_a_line_that_goes_away(monkeypatch):
    made, out, log = on_screen(monkeypatch)
    with made.progress():
        made.step(Progress(0, 2, 5, 20, {"loss": 0.5}))
        made.step(Progress(1, 2, 20, 20, {"loss": 0.25}))
        assert made.line is not None
        made.line.progress.refresh()
    assert made.line is None
    assert "40/40 steps" in log.getvalue()
    assert "loss 0.25" in log.getvalue()
    with made.progress():
        made.step(Progress(0, 1, 20, 20, {}))
        made.step(Progress(1, 4, 10, 50, {"loss": 0.5}, "learning", 0.3))
        made.step(Progress(2, 4, 3, 7, {}, "solving", 0.5))
        made.line.progress.refresh()
        assert re.search(r"solving unit 3/4\b.* 3/7 layers", log.getvalue())
        made.step(Progress(2, 4, 10, 100, {"loss": 0.5}, "learning", 0.6))
        made.line.progress.refresh()
    assert re.search(r"learning unit 3/4\b.* 10/100 steps", log.getvalue())
    assert out.getvalue() == ""


def test_a_phase_without_steps_says_what_it_is_and_how_long_it_takes(monkeypatch):
    made, _, log = on_screen(monkeypatch)
    with made.progress():
        made.phase(RunPhase("calibrating", 30.0, 60.0))
        assert made.line is not None
        made.line.progress.refresh()
        assert re.search(r"calibrating .*\b\d+ s, about (89|90) s left", log.getvalue())
        made.phase(RunPhase("judging", 50.0, 10.0))
        made.line.progress.refresh()
        assert "judging" in log.getvalue()
        made.stage("estimating")
    assert re.search(r"\[ {3}0\.\d s, about \d+ s left\] estimating", log.getvalue())
    assert made.left == ""


def test_a_pipe_is_told_that_work_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.04)
    made = Terminal()
    with made.progress():
        made.phase(RunPhase("calibrating", 30.0, 60.0))
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(re.search(r"s, about \d+ s left\] still calibrating$", line) for line in lines)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_long_names_are_cut_in_the_middle(monkeypatch):
    made, out, _ = on_screen(monkeypatch)
    names = [f"features.stage{i}.{'block.' * 20}conv.weight" for i in (1, 2)]
    made.table("", ("layer", "bits"), [[name, "8/8"] for name in names])
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    shown = [line for line in lines if "8/8" in line]
    assert max(map(len, lines)) <= 90
    assert [len(line.split()) for line in shown] == [2, 2]
    for i, line in enumerate(shown):
        assert line.strip().startswith(f"features.stage{i + 1}.block")
        assert "…" in line
        assert line.split()[0].endswith("conv.weight")
    assert shortened("short", 12) == "short"
    assert shortened("0123456789", 5) == "01…89"
    assert shortened("0123456789", 6) == "01…789"


def test_names_that_differ_in_the_middle_stay_apart():
    names = [f"model/block/{kind}/BiasAdd" for kind in ("conv", "depthwise", "conv")]
    assert told_apart(names, 40) == names
    assert told_apart(names, 14) == ["model…iasAdd#1", "model…iasAdd#2", "model…iasAdd#1"]
    assert told_apart(["short", *names], 14)[0] == "short"


def test_a_table_in_a_pipe_is_as_wide_as_a_screen(capsys):
    """Converters name a layer after all that they fused; hundreds of letters are no column."""
    Terminal().table("", ("layer", "bits"), [["a" * 300 + "z", "8"], ["fc", "4"]])
    head, first, second = capsys.readouterr().out.splitlines()
    assert max(map(len, (head, first, second))) <= 160
    assert (first[:3], first.split()[0][-1], second.split()) == ("aaa", "z", ["fc", "4"])


def test_rows_of_layers():
    rows = layer_rows(
        Report(
            (
                LayerReport("conv1", "Conv2d", 8, 4, 300, 1234, 31.27),
                LayerReport("fc", "Linear", None, None, 100, 5, math.inf),
            ),
            *(1.0, 4, 30.0, True),
        )
    )
    assert rows == [
        ["conv1", "Conv2d", "8/4", "75.0 %", "1,234", "31.3"],
        ["fc", "Linear", "float/float", "25.0 %", "5", "exact"],
    ]
    assert len(LAYER_HEADER) == len(rows[0])
    assert layer_rows(Report((), 1.0, 1, 1.0, True)) == []


def test_coverage_is_weighted_by_work():
    assert coverage_line(report("a", "b")) == (
        "quantized 2/2 layers (100.0 % of MACs, 100.0 % of weights, 8.00 bits a weight on average)"
    )
    names = [f"layer{i}\n" for i in range(7)]
    assert coverage_line(report(*names, bits=None)) == (
        "quantized 0/7 layers (0.0 % of MACs, 0.0 % of weights, 32.00 bits a weight on average); "
        "float: layer0\\n, layer1\\n, layer2\\n, layer3\\n, layer4\\n, …"
    )


def test_float_layers_say_why():
    layers = (
        LayerReport("a", "Conv2d", None, 8, 100, 50, 30.0, "a rule keeps it in float"),
        LayerReport("b\n", "MatMul", None, None, 100, 0, 30.0, "why not"),
    )
    line = coverage_line(Report(layers, 1.0, 4, 30.0, True))
    assert line.endswith("; float: a (a rule keeps it in float), b\\n (why not)")


def test_what_else_is_in_float():
    assert float_line(report("a")) == ""
    kinds = (
        FloatKind("LayerNorm", 12, "no 8-bit form"),
        FloatKind("BatchNorm", 3, "not behind a convolution"),
        FloatKind("GELU", 25, "no 8-bit form"),
    )
    found = dataclasses.replace(report("a"), in_float=kinds)
    assert float_line(found) == (
        "in float: 12 LayerNorm, 25 GELU (no 8-bit form); 3 BatchNorm (not behind a convolution)"
    )


def test_how_much_of_a_network_is_in_float():
    """A layer of 100 products and 50 weights, and what stays float beside it."""
    kinds = FloatKind("Embed", 1, "reads ids", 0, 150), FloatKind("Recurrent", 2, "steps", 300, 200)
    found = dataclasses.replace(report("a"), in_float=kinds)
    assert coverage_line(found).startswith(
        "quantized 1/1 layers (25.0 % of MACs, 12.5 % of weights"
    )
    assert float_line(found) == (
        "in float: 1 Embed, 37.5 % of weights (reads ids); 2 Recurrent, 75.0 % of MACs, 50.0 % of "
        "weights (steps)"
    )
    assert layer_rows(found)[0][3] == "25.0 %"


def test_what_shares_a_grid_at_its_cost():
    assert shared_line(report("a")) == ""
    found = SharedGrid("join\n", "scores", 41.4, 2.2), SharedGrid("qkv", "v", 40.0, 15.0)
    assert shared_line(dataclasses.replace(report("a"), shared_grids=found[:1])) == (
        "unequal parts on one grid: scores keeps 2 dB on that of join\\n, 41 dB on its own"
    )
    both = dataclasses.replace(report("a"), shared_grids=found)
    assert shared_line(both).endswith("41 dB on its own; 1 more in the report")


def test_how_far_to_trust():
    good = report("a")
    (line,) = trust_lines(good)
    assert line == (
        "agreement with the float network 100.0 % of 4 held-out synthetic images, "
        "output SQNR 30.0 dB (not an accuracy)"
    )
    assert (
        "100.0 % of the positions of 4 held-out"
        in trust_lines(dataclasses.replace(good, dense=True))[0]
    )
    loss = Estimate(0.006, -0.001, 0.014, 0.03, (0.65, 0.92), 256)
    told = trust_lines(dataclasses.replace(good, estimate=loss))
    assert told[0] == (
        "expected loss of top-1 on real images 0.6 points (-0.1 to 1.4 on 1,000 images)"
    )
    assert told[-1] == line
    single = dataclasses.replace(good, classes=1)
    assert trust_lines(single)[0].startswith("agreement with the sign of the output 100.0 %")
    none = dataclasses.replace(good, classes=0)
    assert trust_lines(none)[0] == (
        "values of outputs on 4 held-out synthetic images: SQNR 30.0 dB, an error of 3.2 % "
        "(not an accuracy)"
    )
    rows = dataclasses.replace(none, rows=True, sqnr=math.inf)
    assert trust_lines(rows)[0] == (
        "values of outputs on 4 held-out synthetic rows: SQNR infinite (no difference) "
        "(not an accuracy)"
    )
    low = dataclasses.replace(good, confidence="low", notes=("noise", "no labels"))
    assert trust_lines(low)[1:] == [
        "LOW CONFIDENCE in these numbers",
        "note: noise",
        "note: no labels",
    ]


class Gone(io.StringIO):
    def write(self, _):
        raise BrokenPipeError


def test_without_a_reader_results_end_the_command_and_logs_do_not():
    with pytest.raises(BrokenPipeError):
        Results(file=Gone()).print("x")
    log = Log(file=Gone())
    log.print("x")
    log.print("y")
    assert log.quiet


def test_units_that_got_worse_are_counted():
    unit = lambda kept: UnitReport("block", "brecq", 2.0, 1.0, kept, 3.0)
    assert units_line("brecq", [unit(True)]) == "brecq: the error of one unit fell to 50 %, in 3 s"
    assert units_line("brecq", [unit(True), unit(False)]) == (
        "brecq: errors of 2 units fell to 71 % on average, in 6 s; "
        "1 would have got worse and was left as it was"
    )
    assert units_line("brecq", 2 * [unit(False)]).endswith(
        "2 would have got worse and were left as they were"
    )


def test_several_outputs_have_a_line_each():
    box = OutputReport("out: box", "values", 40.0, 40.0, None, 0, True, False)
    score = OutputReport("out: score\x1b", "signs", 33.0, 1.2, 0.991, 1, True, True)
    assert len(trust_lines(dataclasses.replace(report("a"), outputs=(box,)))) == 1
    assert trust_lines(dataclasses.replace(report("a"), outputs=(box, score)))[1:] == [
        "  output out: box: SQNR 40.0 dB",
        "  output out: score\\x1b: SQNR 33.0 dB (1.2 dB behind its sigmoid), same sign 99.1 % "
        "RUINED",
    ]
