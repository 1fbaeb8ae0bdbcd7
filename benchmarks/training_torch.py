"""HAST, GDFQ and plain distillation in PyTorch, written from their papers; for comparison only.

Batch norms are not folded and keep their statistics; kernels end at their extremes at every step;
slopes pass through rounding and clipping alike. Facts are those of Li et al. 2023 (HAST), Xu et al.
2020 (GDFQ), Zhong et al. 2022 (IntraQ, whose loss is the plain one) and their released code.
"""

import copy
import math
import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE, MOMENTUM = 20.0, 0.9
SMALLEST = 1e-8
Take = Callable[[], None]
"""One round of a loop, to be called again and again."""


class Setting(NamedTuple):
    """What a loop is told.

    Attributes:
      batch: images of a step.
      rounds: in all.
      warmup: of them, in which a generator plays alone.
      drops: rounds after which the student's rate falls to a tenth.
    """

    batch: int
    rounds: int
    warmup: int = 0
    drops: tuple[int, ...] = ()


class Answers(NamedTuple):
    """What a network makes of a batch.

    Attributes:
      logits: scores of classes.
      branches: what residual branches put out, before it is added to what bypasses them.
      extremes: the largest value of every rectified tensor.
      gaps: of every norm, how far mean and biased variance of what it reads are from those kept.
    """

    logits: Tensor
    branches: list[Tensor]
    extremes: list[Tensor]
    gaps: list[Tensor]


def on_grid(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`x` on the levels between two ends that are extended to 0; the slope is 1 everywhere."""
    with torch.no_grad():
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST)
        zero = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1)
        error = (codes - zero) * scale - x
    return x + error


def kernel_on_grid(kernel: Tensor, bits: int) -> Tensor:
    """A kernel on a grid for each output channel, between the channel's extremes."""
    rows, columns = kernel.detach().flatten(1), (-1, *[1] * (kernel.ndim - 1))
    return on_grid(kernel, rows.amin(1).view(columns), rows.amax(1).view(columns), bits)


class Student(nn.Module):
    """A CIFAR ResNet of `synthesis_loops`, in float or with kernels and rectified tensors on grids.

    Args:
      network: to copy, in evaluation mode.
      bits: of kernels and of activations; None for float.
      whole: all that reads a rectified tensor reads it rounded, shortcuts and the last pooling too,
        as where code replaces activation functions; else convolutions alone.
    """

    def __init__(
        self, network: Any, bits: tuple[int, int] | None = None, *, whole: bool = False
    ) -> None:
        super().__init__()
        self.network, self.bits, self.whole = copy.deepcopy(network).eval(), bits, whole
        self.tops: list[Tensor] = []

    def kernel(self, layer: Any) -> Tensor:
        """Of a layer, as it is multiplied."""
        return layer.weight if self.bits is None else kernel_on_grid(layer.weight, self.bits[0])

    def edge(self, x: Tensor, index: int) -> Tensor:
        """The rectified tensor of a number, as it is read."""
        if self.bits is None or not self.tops:
            return x
        return on_grid(x, torch.zeros(()), self.tops[index], self.bits[1])

    def forward(self, x: Tensor, *, statistics: bool = False) -> Answers:
        """What it makes of images; gaps of statistics where they are asked for."""
        conv, norm, _, *blocks, pool, flat, last = self.network.children()
        found = Answers(x, [], [], [])

        def normed(norm: Any, y: Tensor) -> Tensor:
            if statistics:
                mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
                apart = F.mse_loss(mean, norm.running_mean) + F.mse_loss(var, norm.running_var)
                found.gaps.append(apart)
            return norm(y)

        def rectified(y: Tensor) -> tuple[Tensor, Tensor]:
            y = y.relu()
            found.extremes.append(y.detach().amax())
            snapped = self.edge(y, len(found.extremes) - 1)
            return snapped, snapped if self.whole else y

        multiply = lambda layer, y: F.conv2d(
            y, self.kernel(layer), None, layer.stride, layer.padding
        )
        read, bypassing = rectified(normed(norm, multiply(conv, x)))
        for block in blocks:
            y, _ = rectified(normed(block.bn1, multiply(block.conv1, read)))
            y = normed(block.bn2, multiply(block.conv2, y))
            found.branches.append(y)
            if block.half:
                ends = (0, 0, 0, 0, block.half, block.half)
                bypassing = F.pad(bypassing[:, :, ::2, ::2], ends)
            read, bypassing = rectified(y + bypassing)
        features = flat(pool(bypassing))
        return found._replace(logits=F.linear(features, self.kernel(last), last.bias))

    def calibrate(self, teacher: "Student", images: Tensor) -> None:
        """Ranges of rectified tensors, as some images show them to the float network."""
        with torch.no_grad():
            each = [torch.stack(teacher(x).extremes) for x in images.split(64)]
        self.tops = list(torch.stack(each).amax(0))

    def follow(self, extremes: list[Tensor], *, first: bool) -> None:
        """Ranges a step later, averaged over steps."""
        share = 0.0 if first else MOMENTUM
        pairs = zip(self.tops, extremes, strict=True)
        self.tops = [share * old + (1 - share) * new for old, new in pairs]


def divergence(exact: Tensor, rough: Tensor, over: Literal["images", "entries"]) -> Tensor:
    """`T^2 KL`, averaged over images, or over the entries of all."""
    said, asked = F.log_softmax(rough / TEMPERATURE, 1), F.softmax(exact / TEMPERATURE, 1)
    shared = exact.shape[1] if over == "entries" else 1
    return TEMPERATURE**2 * F.kl_div(said, asked, reduction="batchmean") / shared


def attention(exact: list[Tensor], rough: list[Tensor]) -> Tensor:
    """How far energies of channels are from the teacher's, as directions; summed over tensors."""
    unit = lambda v: F.normalize(v.pow(2).mean((2, 3)), dim=1)
    gaps = [F.mse_loss(unit(b), unit(a)) for a, b in zip(exact, rough, strict=True)]
    return torch.stack(gaps).sum()


def windows(images: Tensor) -> Tensor:
    """Of each image a window of at least half the area, resized, mirrored every other time."""
    height, width = images.shape[2:]
    made = []
    for image in images:
        top, left, h, w = window(height, width)
        part = image[None, :, top : top + h, left : left + w]
        part = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
        made.append(part.flip(-1) if random.random() < 0.5 else part)
    return torch.cat(made)


def window(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width, drawn up to ten times until they fit."""
    for _ in range(10):
        area = height * width * random.uniform(0.5, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if h <= height and w <= width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


def sgd(student: Student, rate: float, drops: tuple[int, ...]) -> tuple[Any, Any]:
    """Nesterov's momentum and decay of weights; the rate falls to a tenth at each drop."""
    kinds = {"momentum": MOMENTUM, "weight_decay": 1e-4, "nesterov": True}
    optimizer = torch.optim.SGD(student.parameters(), lr=rate, **kinds)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, list(drops))


def shuffled(images: Tensor, batch: int) -> Callable[[], Tensor]:
    """Batches of a set, each image once an epoch, but for a last incomplete batch."""
    order: list[Tensor] = []

    def draw() -> Tensor:
        if not order:
            rows = torch.randperm(len(images))[: len(images) // batch * batch]
            order.extend(rows.split(batch))
        return images[order.pop()]

    return draw


def plain(teacher: Student, student: Student, images: Tensor, setting: Setting) -> Take:
    """IntraQ's loss: `CE + 20 KL`, labels being what the teacher says of the shown images."""
    optimizer, rates = sgd(student, 1e-4, setting.drops)
    draw = shuffled(images, setting.batch)

    def take() -> None:
        x = windows(draw())
        with torch.no_grad():
            exact = teacher(x).logits
        rough = student(x).logits
        loss = F.cross_entropy(rough, exact.argmax(1)) + 20 * divergence(exact, rough, "images")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()

    return take


def hast(teacher: Student, student: Student, images: Tensor, setting: Setting) -> Take:
    """HAST: `20 KL + 1000 FA` of images, and of images moved to where it is larger."""
    optimizer, rates = sgd(student, 1e-5, setting.drops)
    draw = shuffled(images, setting.batch)
    teacher.requires_grad_(False)

    def loss_of(exact: Answers, rough: Answers) -> Tensor:
        apart = attention(exact.branches, rough.branches)
        return 20 * divergence(exact.logits, rough.logits, "images") + 1000 * apart

    def take() -> None:
        x = windows(draw()).requires_grad_()
        optimizer.zero_grad()
        loss_of(teacher(x), student(x)).backward()
        slope: Any = x.grad
        moved = x.detach() + 0.01 * torch.sign(slope)
        with torch.no_grad():
            exact = teacher(moved)
        loss_of(exact, student(moved)).backward()
        optimizer.step()
        rates.step()

    return take


class Generator(nn.Module):
    """GDFQ's generator for images of 32x32 pixels and ten classes; its norms follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(10, 100)
        self.project, self.norm = nn.Linear(100, 128 * 8 * 8), nn.BatchNorm2d(128)
        self.conv1, self.norm1 = nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128, eps=0.8)
        self.conv2, self.norm2 = nn.Conv2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64, eps=0.8)
        self.last, self.centred = nn.Conv2d(64, 3, 3, 1, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, labels: Tensor) -> Tensor:
        """Images of labels."""
        codes = self.vectors(labels) * torch.randn(len(labels), 100)
        y = self.norm(self.project(codes).view(-1, 128, 8, 8))
        y = F.leaky_relu(self.norm1(self.conv1(F.interpolate(y, scale_factor=2))), 0.2)
        y = F.leaky_relu(self.norm2(self.conv2(F.interpolate(y, scale_factor=2))), 0.2)
        return self.centred(torch.tanh(self.last(y)))


def gdfq(teacher: Student, student: Student, images: Tensor, setting: Setting) -> Take:
    """GDFQ: a generator and a student in turn, both on the same images; none of a set are used.

    Ranges are averaged over the images of the warm-up by plain shares: released code divides by
    `1 - 0.9^t` in place, which makes them thousands of times too wide for a while.
    """
    del images
    generator = Generator()
    makes = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    quarters = [setting.rounds * k // 4 for k in (1, 2, 3)]
    falls = torch.optim.lr_scheduler.MultiStepLR(makes, quarters)
    learns, rates = sgd(student, 1e-4, setting.drops)
    teacher.requires_grad_(False)
    done = 0

    def take() -> None:
        nonlocal done
        labels = torch.randint(10, (setting.batch,))
        x = generator(labels)
        seen = teacher(x, statistics=True)
        loss = F.cross_entropy(seen.logits, labels) + 0.1 * torch.stack(seen.gaps).mean()
        makes.zero_grad()
        loss.backward()
        makes.step()
        falls.step()
        x, exact = x.detach(), seen.logits.detach()
        if done < setting.warmup:
            with torch.no_grad():
                student.follow(student(x).extremes, first=done == 0)
        else:
            rough = student(x).logits
            taught = F.cross_entropy(rough, labels) + divergence(exact, rough, "entries")
            learns.zero_grad()
            taught.backward()
            learns.step()
            rates.step()
        done += 1

    return take
