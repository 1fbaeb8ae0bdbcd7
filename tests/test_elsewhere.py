"""Methods that no name can ask for are refused with where they are, in Python and by commands."""

import pytest

import dfq_jax as dfq
from dfq_jax.base.elsewhere import ELSEWHERE
from dfq_jax.base.words import MethodName, ReconstructionName, TrainingName
from dfq_jax.cli import app
from dfq_jax.errors import UsageError
from dfq_jax.recipes.presets import offer_of
from dfq_jax.recipes.reconstructions import methods_of
from dfq_jax.recipes.trainings import training_for

ASKED = {
    "fdda": (offer_of, ["synthesize", "x.onnx", "-o", "y", "--method"]),
    "lq_nets": (methods_of, ["quantize", "x.onnx", "-o", "y", "--reconstruction"]),
    "lq_nets_qat": (training_for, ["train", "x.onnx", "-o", "y", "--method"]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_method_that_is_elsewhere_is_refused_with_where(name, capsys):
    ask, tokens = ASKED[name]
    with pytest.raises(UsageError, match=rf"{name}'.*dfq\.methods\.{name}"):
        ask(name)
    with pytest.raises(SystemExit) as stopped:
        app.main([*tokens, name])
    assert stopped.value.code == 2
    assert f"dfq.methods.{name}" in " ".join(capsys.readouterr().err.split())
    assert hasattr(dfq.methods, name)


def test_what_a_name_can_ask_for_is_not_elsewhere():
    names = {n for kind in (MethodName, ReconstructionName, TrainingName) for n in kind.__args__}
    assert not names & set(ELSEWHERE)
