"""Faster equivalents of three functions of `transformers`, for training on one GPU.

The model stays `Qwen3_5MoeForCausalLM`; `install()` replaces the chunked delta rule and the
causal convolution of its GatedDeltaNet, and registers an experts implementation. Each computes
what the original computes; `python fast_ops.py` compares them, forward and backward, in float64
where the original allows it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

CHUNK = 64


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Inverse of I + L for strictly lower triangular L [..., 64, 64], by matrix products alone.

    The 16-wide diagonal blocks by a Neumann product (L^16 = 0, and at this width the powers stay
    small), then twice the inverse of a 2x2 block matrix:
    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]].
    """
    size = 16
    count = lower.shape[-1] // size
    tiles = lower.unflatten(-2, (count, size)).unflatten(-1, (count, size)).transpose(-3, -2)
    power = -torch.stack([tiles[..., i, i, :, :] for i in range(count)], dim=-3)
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device) + power
    for _ in range(3):
        power = power @ power
        inverse = inverse + inverse @ power
    blocks = list(inverse.unbind(-3))
    while len(blocks) > 1:
        merged = []
        for i in range(0, len(blocks), 2):
            a, b = blocks[i], blocks[i + 1]
            corner = lower[..., (i + 1) * size : (i + 2) * size, i * size : (i + 1) * size]
            bottom = torch.cat([-(b @ corner @ a), b], dim=-1)
            merged.append(torch.cat([F.pad(a, (0, size)), bottom], dim=-2))
        blocks, size = merged, 2 * size
    return blocks[0]


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """The gated delta rule over whole sequences, without an initial state, in float32.

    query, key [batch, n, key heads, Dk]; value [batch, n, heads, Dv]; g, beta [batch, n, heads];
    n a multiple of 64. Returns [batch, n, heads, Dv].
    """
    heads = value.shape[2]
    # transformers up to 5.17 repeats the key heads itself, 5.23 leaves that to this function.
    query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    dtype, (batch, n, _, width) = query.dtype, query.shape
    kind = torch.promote_types(torch.float32, dtype)
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (
            x.to(kind).transpose(1, 2).reshape(batch, heads, n // CHUNK, CHUNK, -1)
            for x in (query, key, value)
        )
        g, beta = (
            x.to(kind).transpose(1, 2).reshape(batch, heads, n // CHUNK, CHUNK) for x in (g, beta)
        )
        query = query * torch.rsqrt((query * query).sum(-1, keepdim=True) + 1e-6) * width**-0.5
        key = key * torch.rsqrt((key * key).sum(-1, keepdim=True) + 1e-6)
        total = g.cumsum(-1)
        mask = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).tril()
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~mask, float("-inf")).exp()
        k_beta = key * beta.unsqueeze(-1)
        inverse = unit_lower_inverse(((k_beta @ key.mT) * decay).tril(-1))
        u = inverse @ (value * beta.unsqueeze(-1))
        w = inverse @ (k_beta * total.exp().unsqueeze(-1))
        within = (query @ key.mT) * decay
        query = query * total.exp().unsqueeze(-1)
        key = key * (total[..., -1:] - total).exp().unsqueeze(-1)
        last = total[..., -1].exp()[..., None, None]
        state = torch.zeros(batch, heads, width, value.shape[-1], dtype=kind, device=g.device)
        outputs = []
        for i in range(n // CHUNK):
            fresh = u[:, :, i] - w[:, :, i] @ state
            outputs.append(query[:, :, i] @ state + within[:, :, i] @ fresh)
            state = state * last[:, :, i] + key[:, :, i].mT @ fresh
        out = torch.stack(outputs, dim=2).reshape(batch, heads, n, -1)
        return out.transpose(1, 2).to(dtype), None


def causal_conv1d(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """Depthwise causal convolution and SiLU. hidden [batch, C, n], weight [C, 4]."""
    width = weight.shape[-1]
    padded = F.pad(hidden, (width - 1, 0))
    n = hidden.shape[-1]
    taps = (padded[..., j : j + n] * weight[:, j, None] for j in range(width))
    return F.silu(sum(taps)).to(hidden.dtype)


class Gather(torch.autograd.Function):
    """x[index] whose backward is a gather too: rows of the gradient, then a sum over `repeat`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, repeat: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.repeat = repeat
        return x[index // repeat] if repeat > 1 else x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        if ctx.repeat > 1:
            grad = grad.view(-1, ctx.repeat, grad.shape[-1]).sum(1)
        return grad, None, None, None


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [S, in], sorted by expert, times that expert's weight [E, out, in]."""
    if x.is_cuda:
        return F.grouped_mm(x.bfloat16(), weight.bfloat16().mT, offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([x[starts[e] : starts[e + 1]] @ w.mT for e, w in enumerate(weight)])


def sorted_experts(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All top-k experts of all tokens as two grouped products. hidden [n, H], index [n, k]."""
    k = index.shape[-1]
    flat = index.reshape(-1)
    order = torch.argsort(flat)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(self.num_experts, device=flat.device)
    ends = (flat[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
    rows = Gather.apply(hidden.bfloat16() if hidden.is_cuda else hidden, order, inverse, k)
    gate, up = grouped(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
    out = grouped(F.silu(gate) * up, self.down_proj, ends)
    out = Gather.apply(out, inverse, order, 1)
    out = (out.view(-1, k, out.shape[-1]) * weights.unsqueeze(-1)).sum(1)
    return out.to(hidden.dtype)


def install() -> None:
    qwen.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    qwen.causal_conv1d_fn = causal_conv1d
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


def check() -> None:
    torch.manual_seed(0)

    def compare(name: str, ours: Any, theirs: Any, *args: Tensor) -> None:
        results = []
        for function in (ours, theirs):
            inputs = [a.detach().clone().requires_grad_() for a in args]
            out = function(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append([out, *(i.grad for i in inputs)])
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
        print(f"{name}: largest relative difference {worst:.1e}")
        assert worst < 2e-5, name

    q, k, v = (torch.randn(2, 192, heads, 64) for heads in (1, 1, 3))
    k[:, 50:120] = k[:, 50:51]  # a run of one token: all keys equal, the hard case
    g, beta = -torch.rand(2, 192, 3) * 0.2, torch.rand(2, 192, 3)
    original = qwen.torch_chunk_gated_delta_rule
    compare(
        "delta rule", chunk_gated_delta_rule,
        lambda *a: original(*a, use_qk_l2norm_in_kernel=True), q, k, v, g, beta,
    )  # fmt: skip
    theirs = qwen.causal_conv1d_fn
    compare(
        "convolution", causal_conv1d, lambda x, w: theirs(x, w, activation="silu"),
        torch.randn(2, 32, 50), torch.randn(32, 4),
    )  # fmt: skip
    config = qwen.Qwen3_5MoeTextConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=12, num_experts_per_tok=5
    )
    config._experts_implementation = "eager"
    experts = qwen.Qwen3_5MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    index = torch.rand(40, 12).topk(5).indices
    compare(
        "experts", lambda x, w: sorted_experts(experts, x, index, w),
        lambda x, w: experts(x, index, w), torch.randn(40, 64), torch.rand(40, 5),
    )  # fmt: skip


if __name__ == "__main__":
    check()
