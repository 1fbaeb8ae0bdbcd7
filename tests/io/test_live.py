"""Live modules: the program of the file that torch.export would have written."""

import io
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.frontends.live import exported_program
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())


def saved(module: nn.Module, *inputs: Tensor) -> Program:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), inputs), buffer)
    return read_pt2(buffer.getvalue(), "net.pt2")


def assert_equal(got: Program, expected: Program) -> None:
    assert got.calls == expected.calls
    assert got.inputs == expected.inputs
    assert got.outputs == expected.outputs
    assert got.paths == expected.paths
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array)


@pytest.mark.parametrize(
    "example", [(3, 8, 8), [3, 8, 8], torch.randn(1, 3, 8, 8)], ids=["tuple", "list", "tensor"]
)
def test_same_as_the_file(example):
    expected = saved(net(), torch.zeros(1, 3, 8, 8))
    assert_equal(exported_program(net(), example, where="net"), expected)


def test_exported_program():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(net().eval(), (torch.zeros(2, 3, 8, 8),))
    program = exported_program(exported, None, where="net")
    assert_equal(program, saved(net(), torch.zeros(2, 3, 8, 8)))


@pytest.mark.parametrize("training", [True, False])
def test_module_is_left_as_it_was(training):
    module = net().train(training)
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    exported_program(module, (3, 8, 8), where="net")
    assert [part.training for part in module] == [training, False, training, training]
    assert module.training is training
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_weights_are_copies():
    module = net()
    program = exported_program(module, (3, 8, 8), where="net")
    before = program.arrays["p_0_weight"].copy()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    np.testing.assert_array_equal(program.arrays["p_0_weight"], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_example_has_the_type_of_the_weights(dtype):
    program = exported_program(net().to(dtype), (3, 8, 8), where="net")
    assert program.arrays["p_0_weight"].dtype.name == str(dtype).removeprefix("torch.")


def test_network_without_weights():
    assert exported_program(nn.ReLU(), (3,), where="net").calls[0].target == "aten.relu.default"


class Undecided(nn.Module):
    """Branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def test_refusal_names_reason_and_place():
    with pytest.raises(UnsupportedModelError) as caught:
        exported_program(nn.Sequential(Undecided()), (3,), where="the network")
    text = str(caught.value)
    assert text.startswith("the network cannot be exported by torch.export at test_live.py:")
    assert "in forward" in text
    assert "data-dependent" in text


def test_failing_network_is_restored():
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError(f"no such thing as {x.shape[1]} \x1b[31m channels")

    module = Failing().train()
    with pytest.raises(UnsupportedModelError, match=r"no such thing as 3 \\x1b"):
        exported_program(module, (3,), where="net")
    assert module.training


def test_wrong_shape_is_the_networks_own_error():
    with pytest.raises(UnsupportedModelError, match=r"cannot be exported .*channels"):
        exported_program(net(), (4, 8, 8), where="net")


class Noisy(nn.Module):
    """Warns when it runs, as the exporter sometimes does."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return x * 2


def test_warnings_do_not_escape():
    assert exported_program(Noisy(), (3,), where="net").calls


@pytest.mark.parametrize("example", [None, "3,8,8", (3, 8.0, 8), (0, 8, 8), (3, True), 3])
def test_bad_examples(example: Any):
    with pytest.raises(UsageError, match="expected an input tensor or the shape"):
        exported_program(net(), example, where="net")


def test_no_module():
    with pytest.raises(UsageError, match="net is dict; expected a torch"):
        exported_program({}, (3, 8, 8), where="net")


def test_missing_and_old_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.9 or newer, not 2\.8\.0\+cpu"):
        exported_program(net(), (3, 8, 8), where="net")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install dfq-jax\[torch\]"):
        exported_program(object(), (3, 8, 8), where="net")


def test_pytorch_is_not_imported_by_the_reader():
    source = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, dfq_jax.io.frontends.live; assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
    )
    assert source.returncode == 0, source.stderr
