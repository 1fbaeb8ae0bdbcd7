"""Exported networks that write into tensors, keep state, or are in training mode."""

import pytest
import torch
import torch.nn.functional as F
from pt2_programs import assert_same, exported, read, targets
from torch import Tensor, nn

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.program import Ref
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch


class InPlace(nn.Module):
    """In-place operators whose argument is read again under its old name."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.relu_().add_(1)
        y.mul_(3)
        x.sub_(1)
        return y + z + x


def test_in_place_operators_keep_their_meaning():
    program = read(InPlace(), torch.zeros(2, 3))
    assert_same(program, InPlace(), torch.randn(2, 3))
    total = program.calls[-2].kwargs
    assert total["x"] == total["other"] == Ref("mul_")
    functional = read(InPlace(), torch.zeros(2, 3), decompose=True)
    assert_same(functional, InPlace(), torch.randn(2, 3))
    assert functional.notes == ("the network writes into its input x; the imported one does not",)


class Through(nn.Module):
    """Changes a tensor through one view of it and reads another."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(-1)
        if self.kind == "whole":
            y.relu_()
            return view * 2
        if self.kind == "dropout":
            F.dropout(y, training=False).relu_()
            return y
        grid = torch.broadcast_tensors(y, torch.zeros(2, 2, 3))[0]
        y.add_(1)
        return grid * 2


@pytest.mark.parametrize("kind", ["whole", "dropout", "list"])
def test_changes_through_views_are_refused_and_the_way_out_works(kind):
    with pytest.raises(UnsupportedModelError, match=r"reads .* in place through.*run_decompos"):
        read(Through(kind), torch.zeros(2, 3))
    program = read(Through(kind), torch.zeros(2, 3), decompose=True)
    if kind == "whole":  # in the others PyTorch's own decomposition takes views for copies
        assert_same(program, Through(kind), torch.randn(2, 3))


class Parts(nn.Module):
    """Writes into parts of tensors, as masks are made."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = x.new_zeros(4, 4)
        for at, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, None))):
            mask[rows, 0:3:2] = float(at)
        y = x * 2
        row = y[1]
        row.mul_(3).add_(1)
        y[:, 1] -= 5
        y[0][2] = x[1, 1]
        y.relu_().unsqueeze_(0).squeeze_(0)
        y[2] = 7.0
        return mask, y, y[1], y[2] * 2


def test_changes_of_slices_are_written_back():
    program = read(Parts(), torch.zeros(4, 4))
    assert_same(program, Parts(), torch.randn(4, 4))
    kinds = set(targets(program))
    assert {"aten.slice_scatter.default", "aten.select_scatter.default"} <= kinds


def test_other_slices_of_a_changed_tensor_are_refused():
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            row, column = y[0], y[:, 0]
            row.relu_()
            return column * 2

    with pytest.raises(UnsupportedModelError, match=r"in place through a view"):
        read(Other(), torch.zeros(2, 3))


def test_slices_of_many_slices_are_refused():
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = part = x * 2
            for _ in range(9):
                part = part[0]
            part.relu_()
            return y

    with pytest.raises(UnsupportedModelError, match="slice of over 8 slices in place"):
        read(Deep(), torch.zeros((1,) * 10))


TRAINING = {
    "batch norm": nn.BatchNorm2d(3),
    "dropout": nn.Dropout(0.5),
    "instance norm": nn.InstanceNorm2d(3, track_running_stats=True),
}


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("decompose", [False, True])
def test_training_mode_is_refused(kind, decompose):
    data = exported(TRAINING[kind].train(), torch.randn(2, 3, 4, 4), decompose=decompose)
    with pytest.raises(UnsupportedModelError, match=r"Call model\.eval\(\) before exporting"):
        read_pt2(data, "net.pt2")


def test_norms_without_statistics_are_not_training():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))
    program = read(net, torch.zeros(2, 3, 4, 4))
    assert program.calls[0].kwargs["running_mean"] is None


def test_networks_that_keep_state_are_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x + self.steps

    for decompose in (False, True):
        with pytest.raises(UnsupportedModelError, match="steps"):
            read(Counter(), torch.zeros(1), decompose=decompose)
