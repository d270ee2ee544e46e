"""The model once more, in plain torch on dense float64 matrices, with autograd. It checks the gradients of the graph.

Written from docs/spec/graph.md, one sequence and one expert at a time; shares no code with `reference/graph`.
Legend: P positions, D width, H heads, C head width, R rotary width.
"""

from __future__ import annotations

import cmath

import torch
from torch import Tensor

from arbitor.reference.config import ArbConfig

Matrices = dict[str, Tensor]


def loss(matrices: Matrices, config: ArbConfig, ids_BT: Tensor) -> Tensor:
    """Return the mean of -log p(byte t) over the bytes from the fourth on."""
    terms = []
    for ids_T in ids_BT:
        log_p = logits(matrices, config, ids_T).log_softmax(dim=-1)
        terms += [-log_p[place - 3, ids_T[place]] for place in range(3, len(ids_T))]
    return torch.stack(terms).mean()


def logits(matrices: Matrices, config: ArbConfig, ids_T: Tensor) -> Tensor:
    """Return the logits of one sequence, [P, 297]."""
    e_TE = matrices["embedding.table"][ids_T]
    trigrams = torch.stack([torch.cat(list(e_TE[place : place + 3])) for place in range(len(ids_T) - 2)])
    h = norm(trigrams @ matrices["sequencer.project"].T, matrices["sequencer.norm"])
    for place in range(config.num_layers):
        own = {name.removeprefix(f"layers.{place}."): value for name, value in matrices.items()}
        h = h + attention(own, config, norm(h, own["attention_norm"]))
        turns = config.max_moe_iters if place == config.num_layers - 1 else 1
        h = torch.stack([turned_around(own, config, e, turns) for e in h])
    n = norm(h, matrices["byte_head.norm"])
    u = (
        h
        + (swish(n @ matrices["byte_head.gate"].T) * (n @ matrices["byte_head.up"].T))
        @ matrices["byte_head.down"].T
    )
    return norm(u, matrices["byte_head.vocabulary_norm"]) @ matrices["byte_head.vocabulary"].T


def attention(own: Matrices, config: ArbConfig, x_PD: Tensor) -> Tensor:
    """Return causal latent attention, one head at a time."""
    head, rotary = config.head_dim, config.rotary_dim
    queries = (
        norm(x_PD @ own["attention.query_down"].T, own["attention.query_norm"]) @ own["attention.query_up"].T
    )
    latent_and_key = x_PD @ own["attention.latent_down"].T
    latent = norm(latent_and_key[:, : config.kv_latent], own["attention.latent_norm"])
    shared_key = turned(latent_and_key[:, config.kv_latent :])
    keys, values = latent @ own["attention.key_up"].T, latent @ own["attention.value_up"].T
    gathered = []
    for place in range(config.num_heads):
        q = queries[:, place * head : (place + 1) * head]
        q = torch.cat([turned(q[:, :rotary]), q[:, rotary:]], dim=1)
        k = torch.cat([shared_key, keys[:, place * (head - rotary) : (place + 1) * (head - rotary)]], dim=1)
        v = values[:, place * head : (place + 1) * head]
        scores = q @ k.T / head**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        gathered.append(scores.masked_fill(future, -torch.inf).softmax(dim=1) @ v)
    return torch.cat(gathered, dim=1) @ own["attention.output"].T


def turned(x_PR: Tensor) -> Tensor:
    """Return pairs (i, i + R / 2) as complex numbers, turned by e^(i p base^(-2 i / R))."""
    half = x_PR.shape[1] // 2
    angles = [[p * 10_000.0 ** (-2 * i / (2 * half)) for i in range(half)] for p in range(x_PR.shape[0])]
    turns = torch.tensor([[cmath.exp(1j * angle) for angle in row] for row in angles], dtype=torch.complex128)
    spun = torch.complex(x_PR[:, :half], x_PR[:, half:]) * turns
    return torch.cat([spun.real, spun.imag], dim=1)


def turned_around(own: Matrices, config: ArbConfig, e_D: Tensor, turns: int) -> Tensor:
    """Return the mean of a position's turns through the experts, weighted by its halting, as ACT is told."""
    keep = torch.tensor([1 - 2.0 ** -(1 + channel % 4) for channel in range(len(e_D))], dtype=e_D.dtype)
    h, left, total = e_D, torch.ones((), dtype=e_D.dtype), torch.zeros_like(e_D)
    for turn in range(turns):
        h = keep * h + (1 - keep) * e_D
        h = h + mixture(own, config, norm(h, own["moe_graph.moe_norm"])[None])[0]
        if turn == turns - 1:
            return total + left * h
        p = torch.sigmoid(own["moe_graph.halt"][0] @ norm(h, own["moe_graph.halt_norm"]))
        if 1 - left + p >= 0.99:
            return total + left * h
        total, left = total + p * h, left - p
    return total


def mixture(own: Matrices, config: ArbConfig, x_PD: Tensor) -> Tensor:
    """Return the mixture of experts, one position and one chosen expert at a time."""
    outputs = []
    rank, inner = config.expert_rank, config.shared_inner
    for x in x_PD:
        scores, fits = (own["moe_graph.moe.router"] @ read for read in (x, sixteenths(x)))
        chosen = sorted(range(config.num_experts), key=lambda e: (-fits[e].item(), e))[: config.top_k]
        shares = torch.stack([scores[e] for e in chosen]).softmax(dim=0)
        if config.top_k == 1:
            shares = scores.softmax(dim=0)[chosen]
        modulation = torch.ones(config.shared_inner, dtype=x.dtype)
        for share, e in zip(shares, chosen, strict=True):
            a, b = (
                own["moe_graph.moe.expert_down"][e * rank : (e + 1) * rank],
                own["moe_graph.moe.expert_up"][e * inner : (e + 1) * inner],
            )
            modulation = modulation + share * (b @ (a @ x))
        hidden = swish(own["moe_graph.moe.gate"] @ x) * (own["moe_graph.moe.up"] @ x)
        outputs.append(own["moe_graph.moe.down"] @ (hidden * modulation))
    return torch.stack(outputs)


def sixteenths(x: Tensor) -> Tensor:
    """Return x in whole sixteenths, at most 127 of them. Experts are chosen by these."""
    return torch.tensor([round(min(max(16 * value, -127.0), 127.0)) for value in x.tolist()], dtype=x.dtype)


def norm(x: Tensor, weight_1K: Tensor) -> Tensor:
    """Return x / rms(x) * w."""
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight_1K[0]


def swish(x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    return x / (1 + (-x).exp())
