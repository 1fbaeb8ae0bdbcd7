"""Layers with parameters, products, norms and attention against PyTorch, over their attributes."""

from typing import Any

import pytest
from drawn_networks import ROUTES, examples, space
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

ONE_TO_THREE, FLAG = st.integers(1, 3), st.booleans()


def randomised(module: Any) -> Any:
    """A module with statistics and scales as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith(("running_var", "running_mean")) or tensor.ndim == 1:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


@examples(30)
@given(st.data(), ROUTES)
def test_convolution(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    groups, kernel = draw(ONE_TO_THREE), space(draw, rank, 1, 3)
    cin, cout = groups * draw(ONE_TO_THREE), groups * draw(ONE_TO_THREE)
    padding = draw(st.sampled_from(["valid", "same", *[space(draw, rank, 0, 2)] * 3]))
    stride = 1 if padding == "same" else space(draw, rank, 1, 3)
    mode = draw(st.sampled_from(["zeros"] * 4 + ["reflect", "replicate", "circular"]))
    kind = nn.Conv2d if rank == 2 else nn.Conv1d
    given = {"groups": groups, "dilation": space(draw, rank, 1, 2), "bias": draw(FLAG)}
    module = kind(cin, cout, kernel, stride, padding, padding_mode=mode, **given)
    kit.agree(module, (cin, *space(draw, rank, 5, 8)), route)


@examples(12)
@given(st.data(), ROUTES)
def test_padding_before_a_convolution_merges_into_it(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    widths = space(draw, 2 * rank, 0, 3)
    module = (nn.Conv2d if rank == 2 else nn.Conv1d)(2, 3, 2, stride=draw(ONE_TO_THREE), padding=1)
    graph = kit.agree(lambda x: module(F.pad(x, widths)), (2, *space(draw, rank, 3, 6)), route)
    kinds = [type(n.op).__name__ for n in graph.nodes]
    assert kinds[0] == "Conv2d"
    assert "Pad" not in kinds


@examples(25)
@given(st.data(), ROUTES)
def test_transposed_convolution(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    groups, kernel = draw(ONE_TO_THREE), space(draw, rank, 1, 4)
    cin, cout = groups * draw(ONE_TO_THREE), groups * draw(ONE_TO_THREE)
    stride, dilation = space(draw, rank, 1, 3), space(draw, rank, 1, 2)
    padding = space(draw, rank, 0, 2)
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    extra = tuple(draw(st.integers(0, most)) for most in limits)
    kind = nn.ConvTranspose2d if rank == 2 else nn.ConvTranspose1d
    module = kind(cin, cout, kernel, stride, padding, extra, groups, draw(FLAG), dilation)
    size = space(draw, rank, 3, 6)
    made = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(made) > 0)
    kit.agree(module, (cin, *size), route)


@examples(12)
@given(st.data(), ROUTES)
def test_linear(kit, data, route):
    draw = data.draw
    shape = space(draw, draw(ONE_TO_THREE), 1, 5)
    kit.agree(nn.Linear(shape[-1], draw(st.integers(1, 4)), draw(FLAG)), shape, route)


@examples(25)
@given(st.data(), ROUTES)
def test_matrix_products(kit, data, route):
    draw = data.draw
    c, n, k = space(draw, 3, 1, 4)
    right = torch.randn(k, 3)
    products = {
        "matmul": lambda x: x @ right,
        "batched": lambda x: x @ torch.ones(c, k, 2).cumsum(0),
        "left": lambda x: torch.ones(5, n).cumsum(0) @ x,
        "self": lambda x: x @ x.transpose(-1, -2),
        "gram": lambda x: x.transpose(-1, -2) @ x,
        "channels": lambda x: x.flatten(2) @ x.flatten(2).mT,
        "broadcast": lambda x: x @ x.mean(1, keepdim=True).mT,
        "bmm": lambda x: torch.bmm(x.flatten(1, 2), x.flatten(2).mT) if c == n * k else x,
        "merged": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1).mT),
        "unmerged": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1).mT).view(-1, c, n, n),
        "mm": lambda x: torch.mm(x.flatten(1), torch.ones(c * n * k, 2)),
        "addmm": lambda x: torch.addmm(torch.arange(2.0), x.flatten(1), torch.ones(c * n * k, 2)),
        "rank 3 and 4": lambda x: x.mean(1).unsqueeze(1) @ x.mT,
    }
    kind = draw(st.sampled_from(sorted(products)))
    assume(kind != "merged" or route[0] == 1)
    function = products[kind] if kind != "merged" else products["unmerged"]
    kit.agree(function, (c, n, k), route)


EQUATIONS = (
    "bchw,dc->bdhw",
    "bchw,bcij->bhwij",
    "bchw,bcij->bijhw",
    "bchw,hd->bcwd",
    "bchw,bchv->bcwv",
    "bchw,bchv->bvcw",
    "bchw,wd->bchd",
    "bchw,bdhw->bcd",
)


@examples(16)
@given(st.sampled_from(EQUATIONS), st.sampled_from([(1, None), (4, None), (None, None), (4, 13)]))
def test_einsum(kit, equation, route):
    sizes = {"c": 2, "h": 3, "w": 4, "d": 2, "i": 3, "j": 4, "v": 4}
    right = equation.split("->")[0].split(",")[1]

    def function(x: Any) -> Any:
        if right.startswith("b"):
            return torch.einsum(equation, x, x * 2)
        return torch.einsum(equation, x, torch.ones([sizes[c] for c in right]).cumsum(0))

    kit.agree(function, (2, 3, 4), route)


@examples(30)
@given(st.data(), ROUTES)
def test_norms(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 3))
    groups = draw(ONE_TO_THREE)
    shape = (groups * draw(ONE_TO_THREE), *space(draw, rank - 1, 2, 4))
    affine, some = draw(FLAG), draw(st.integers(1, rank))
    batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[rank]
    instance = nn.InstanceNorm2d if rank == 3 else nn.InstanceNorm1d
    norms = [
        batch(shape[0], eps=1e-3, affine=affine),
        nn.LayerNorm(shape[-some:], eps=1e-3, elementwise_affine=affine),
        *([nn.GroupNorm(groups, shape[0], eps=1e-3, affine=affine)] * (rank > 1)),
        *([instance(shape[0], affine=affine)] * (rank > 1)),
        *([instance(shape[0], track_running_stats=True)] * (rank > 1 and route[1] is None)),
    ]
    module = randomised(draw(st.sampled_from(norms)))
    kit.agree(module, shape, route, 1e-4)  # variances of few values


@examples(25)
@given(st.data(), ROUTES)
def test_attention(kit, data, route):
    draw = data.draw
    heads, tokens, width = space(draw, 3, 1, 4)
    mask = draw(st.sampled_from([None, "bool", "float"]))
    causal = draw(FLAG) and mask is None
    scale = draw(st.sampled_from([None, 0.3]))
    allowed = torch.tril(torch.ones(tokens, tokens)).bool()
    masks = {"bool": allowed, "float": torch.randn(1, 1, tokens, tokens), None: None}

    def function(x: Any) -> Any:
        q, k, v = x.reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=masks[mask], is_causal=causal, scale=scale
        )
        return y.transpose(1, 2).reshape(-1, tokens, heads * width)

    assume(route[1] is None or route[1] >= 14)
    kit.agree(function, (tokens, 3 * heads * width), route)


class Attention(nn.Module):
    """`nn.MultiheadAttention` on tokens, batch first or second."""

    def __init__(self, heads: int, width: int, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(heads * width, heads, batch_first=batch_first)
        self.batch_first, self.weights = batch_first, weights

    def forward(self, x: Any) -> Any:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.inner(x, x, x, need_weights=self.weights)[0]
        return y if self.batch_first else y.transpose(0, 1)


@examples(10)
@given(st.data(), ROUTES)
def test_multihead_attention(kit, data, route):
    draw = data.draw
    heads, tokens, width = space(draw, 3, 1, 4)
    assume(route[1] is None or route[1] >= 14)
    module = Attention(heads, width, draw(FLAG), draw(FLAG))
    kit.agree(module, (tokens, heads * width), route)


class Tokens(nn.Module):
    """Patches, a class token, positions, and a head on the class token."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 7, 6))
        self.norm, self.head, self.how = nn.LayerNorm(6), nn.Linear(6, 5), how

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n = x.shape[0]
        token = self.token.repeat(n, 1, 1) if self.how == "repeat" else self.token.expand(n, -1, -1)
        x = torch.cat([token, x], 1) + self.positions
        x = self.norm(x)
        return self.head(x[:, 0] if self.how != "mean" else x[:, 1:].mean(1))


@examples(9)
@given(st.sampled_from(["repeat", "expand", "mean"]), ROUTES)
def test_class_tokens(kit, how, route):
    kit.agree(Tokens(how), (3, 4, 6), route, 1e-4)  # layer norm of six values


class LlamaBlock(nn.Module):
    """Norms by root mean square, rotary places, heads that share keys, a causal mask, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda read, made: nn.Linear(read, made, bias=False)
        self.q, self.k, self.v, self.o = layer(16, 16), layer(16, 8), layer(16, 8), layer(16, 16)
        self.w1, self.w3, self.w2 = layer(16, 24), layer(16, 24), layer(24, 16)
        self.first, self.second = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-5)
        angles = torch.arange(6)[:, None] * 10_000 ** (-torch.arange(4) / 4)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def turned(self, x: Any) -> Any:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Any) -> Any:
        y = self.first(x)
        heads = lambda z: z.view(x.shape[0], 6, -1, 8).transpose(1, 2)
        q, k, v = self.turned(heads(self.q(y))), self.turned(heads(self.k(y))), heads(self.v(y))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(z.transpose(1, 2).reshape(x.shape))
        y = self.second(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def test_a_llama_block(kit):
    graph = kit.agree(randomised(LlamaBlock()), (6, 16), tolerance=1e-5)
    kinds = [type(node.op).__name__ for node in graph.nodes]
    assert kinds.count("RmsNorm") == 2


@examples(8)
@given(st.data())
def test_norms_by_root_mean_square(kit, data):
    shape = (4, 6, 3)[: data.draw(st.integers(2, 3))]
    over = shape[-data.draw(st.integers(1, len(shape) - 1)) :]
    eps = data.draw(st.sampled_from([None, 1e-3]))
    kit.agree(randomised(nn.RMSNorm(over, eps=eps, elementwise_affine=data.draw(FLAG))), shape)


@examples(6)
@given(st.integers(1, 3), st.integers(-3, 3).filter(bool))
def test_values_several_times_in_a_row(kit, times, axis):
    kit.agree(lambda x: F.relu(x).repeat_interleave(times, axis), (2, 3, 4))
