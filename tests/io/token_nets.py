"""Small networks of tokens in the manner of popular repositories, and their files."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WORDS, WIDTH, HEADS, PLACES = 40, 16, 4, 24
LEAST = torch.finfo(torch.float32).min
IDS, MASK, KINDS = NAMES = ("input_ids", "attention_mask", "token_type_ids")


def heads(x: Any, count: int) -> Any:
    """(n, t, d) -> (n, heads, t, d / heads)."""
    return x.view(x.size(0), x.size(1), count, -1).transpose(1, 2)


def joined(x: Any) -> Any:
    """(n, heads, t, size) -> (n, t, d)."""
    x = x.permute(0, 2, 1, 3).contiguous()
    return x.view(x.size(0), x.size(1), -1)


class Encoder(nn.Module):
    """A block of BERT, with a pooler: the mask is added to scores, and may be widened first."""

    def __init__(self, *, widened: bool = False) -> None:
        super().__init__()
        self.widened = widened
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.kinds, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH)
        self.position_ids: torch.Tensor
        self.register_buffer("position_ids", torch.arange(PLACES)[None])
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        n, t = input_ids.shape
        mask = attention_mask[:, None, None, :]
        if self.widened:
            hidden = 1.0 - mask.expand(n, 1, t, t).to(torch.float32)
            mask = hidden.masked_fill(hidden.to(torch.bool), LEAST)
        else:
            mask = (1.0 - mask.to(torch.float32)) * LEAST
        x = self.words(input_ids) + self.kinds(token_type_ids)
        x = self.norm(x + self.places(self.position_ids[:, :t]))
        q, k, v = (heads(f(x), HEADS) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + mask
        x = self.norm1(self.out(joined(scores.softmax(-1) @ v)) + x)
        x = self.norm2(self.down(F.gelu(self.up(x))) + x)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Attending(nn.Module):
    """PyTorch's own attention under a mask of truths, its tokens pooled by it; the last one too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        x = heads(self.words(input_ids), HEADS)
        kept = attention_mask.bool()[:, None, None, :]
        y = joined(F.scaled_dot_product_attention(x, x, x, attn_mask=kept))
        weights = attention_mask[..., None].float()
        pooled = (y * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1), y[:, -1]


class Padded(nn.Module):
    """A decoder that hides later places and those of padding by one mask, made step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        n, t = input_ids.shape
        places = torch.arange(t)
        later = torch.full((t, t), LEAST)
        later = later.masked_fill(places < (places + 1).view(t, 1), 0.0)[None, None]
        hidden = 1.0 - attention_mask[:, None, None, :].expand(n, 1, t, t).to(torch.float32)
        mask = hidden.masked_fill(hidden.bool(), LEAST).masked_fill(later.bool(), LEAST)
        x = heads(self.words(input_ids) + self.places(places)[None], HEADS)
        return self.head(joined(F.scaled_dot_product_attention(x, x, x, attn_mask=mask)))


class Classifier(nn.Module):
    """PyTorch's own encoder, told which tokens are padding by their id; means of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        how = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **how)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Any) -> Any:
        padding = ids.eq(0)
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding)[..., None].float()
        return self.head((x * kept).sum(1) / kept.sum(1).clamp(min=1))


class Projection(nn.Module):
    """The Conv1D of GPT-2."""

    def __init__(self, width: int, made: int) -> None:
        super().__init__()
        self.made = made
        self.weight = nn.Parameter(torch.randn(width, made) / width**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(made))

    def forward(self, x: Any) -> Any:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.made)


class Decoder(nn.Module):
    """A block of GPT-2: learned places, a mask kept as a square of truths."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attend, self.out = Projection(WIDTH, 3 * WIDTH), Projection(WIDTH, WIDTH)
        self.up, self.down = Projection(WIDTH, 24), Projection(24, WIDTH)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.tril(torch.ones(PLACES, PLACES)).bool()[None, None])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Any) -> Any:
        t = input_ids.size(1)
        x = self.words(input_ids) + self.places(torch.arange(t, device=input_ids.device))[None]
        parts = self.attend(self.norm1(x)).split(WIDTH, 2)
        q, k, v = (heads(part, HEADS) for part in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        scores = torch.where(self.seen[:, :, :t, :t], scores, torch.tensor(LEAST))
        x = x + self.out(joined(scores.softmax(-1) @ v))
        return self.head(self.norm(x + self.down(gelu(self.up(self.norm2(x))))))


def gelu(x: Any) -> Any:
    """The approximation by tanh, spelled out as GPT-2 does."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class RootNorm(nn.Module):
    """The norm of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def turned(x: Any) -> Any:
    """The two halves of the last axis exchanged, the new first one negative."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Llama(nn.Module):
    """A block of Llama: rotary places, two heads of keys for four that ask, SwiGLU."""

    def __init__(self, *, own: bool = False) -> None:
        super().__init__()
        self.own, size = own, WIDTH // HEADS
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.inverse: torch.Tensor
        self.register_buffer("inverse", 10_000.0 ** -(torch.arange(0, size, 2) / size))
        self.norm1, self.norm2, self.norm = RootNorm(), RootNorm(), RootNorm()
        self.query, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, 2 * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, input_ids: Any) -> Any:
        n, t = input_ids.shape
        angles = torch.arange(t)[:, None].float() * self.inverse
        angles = torch.cat((angles, angles), -1)
        x = self.words(input_ids)
        y = self.norm1(x)
        q, k, v = heads(self.query(y), 4), heads(self.key(y), 2), heads(self.value(y), 2)
        q, k = (z * angles.cos() + turned(z) * angles.sin() for z in (q, k))
        if self.own:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (
                z[:, :, None].expand(n, 2, 2, t, z.size(-1)).reshape(n, 4, t, z.size(-1))
                for z in (k, v)
            )
            mask = torch.full((t, t), LEAST).triu(1)
            found = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5 + mask).softmax(-1) @ v
        x = x + self.out(joined(found))
        y = self.norm2(x)
        return self.head(self.norm(x + self.down(F.silu(self.gate(y)) * self.up(y))))


def made(kind: type[nn.Module], **how: Any) -> nn.Module:
    """A network of that kind with the same weights every time, ready to be exported."""
    torch.manual_seed(0)
    return kind(**how).eval()


def rows(count: int, length: int = 6, batch: int = 1) -> tuple[Any, ...]:
    """So many inputs for one row or several."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (batch, length), generator=generator)
    mask, kinds = torch.ones_like(ids), torch.zeros_like(ids)
    kinds[:, length // 2 :] = 1
    return (ids, mask, kinds)[:count]


def exported(net: nn.Module, count: int, *, free: bool) -> bytes:
    """The `.pt2` archive of a network."""
    n, t = torch.export.Dim("n", min=1, max=64), torch.export.Dim("t", min=2, max=PLACES - 1)
    sizes = tuple({0: n, 1: t} for _ in range(count)) if free else None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = rows(count, batch=2 if free else 1)
        torch.export.save(torch.export.export(net, given, dynamic_shapes=sizes), buffer)
    return buffer.getvalue()


def onnx_file(path: Path, net: nn.Module, count: int, *, free: bool, opset: int = 17) -> Path:
    """The ONNX file of a network, as PyTorch's exporter writes it."""
    names = list(NAMES[:count])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            rows(count),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names} if free else None,
        )
    return path
