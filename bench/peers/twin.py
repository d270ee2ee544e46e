"""The float twins of the train steps, as a user writes them: plain modules, AdamW or Muon, a recorded step, `torch.compile` or not.

A twin is the same function of equally many weights, up to the choice of experts whose logits are close. It shares nothing with the
graph that it is compared with: no op set, no glue. Its weights are float32, which is what AdamW moves, and each is rounded to the
dtype of the activations where it is used. That is what `torch.autocast` does to products, without autocast.
Legend: B windows, T bytes, P positions, D width, H heads, C columns of a head, R rotary columns, E experts, r expert rank,
I inner width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arbitor.optimized.training.recording import LAUNCHED_FIRST, recorded
from arbitor.reference.config import NGRAM, NUM_BYTES, VOCABULARY_SIZE, ArbConfig
from arbitor.reference.graph.rotary import ROTARY_BASE
from bench import machine, train_step
from bench.inputs import Arguments, Sizes
from bench.peers import Peer

EPS = 1e-6
"""Of every norm: the default of our ops."""

HEAD_COLUMNS = 64
"""C of the transformer."""


TWINS = {"float AdamW": False, "compiled float AdamW": True}
"""Whether a twin is compiled, by the name of the peer."""

MUON_TWINS = {"compiled float Muon": True}
"""The same for twins whose layers Muon trains."""


class Linear(nn.Linear):
    """y = x W^T, with W rounded to the dtype of x."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))


def normed(x: Tensor) -> Tensor:
    """Return x with rows of root mean square 1."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made from one latent a position; [B, P, D] -> [B, P, D]."""

    def __init__(self, config: ArbConfig) -> None:
        super().__init__()
        self.num_heads, self.rotary, self.latent = config.num_heads, config.rotary_dim, config.kv_latent
        self.plain = config.head_dim - config.rotary_dim
        heads_width = config.num_heads * config.head_dim
        self.query_down = Linear(config.width, config.query_latent)
        self.query_up = Linear(config.query_latent, heads_width)
        self.latent_down = Linear(config.width, config.kv_latent + config.rotary_dim)
        self.key_up = Linear(config.kv_latent, config.num_heads * self.plain)
        self.value_up = Linear(config.kv_latent, heads_width)
        self.output = Linear(heads_width, config.width)

    def forward(self, x_BPD: Tensor, turns_2PR: Tensor) -> Tensor:
        """Return what each position gathers from itself and those before it."""
        q_BHPC = self._heads(self.query_up(normed(self.query_down(x_BPD))))
        q_turned, q_plain = q_BHPC.split([self.rotary, self.plain], dim=-1)
        latent_BPL, key_BPR = self.latent_down(x_BPD).split([self.latent, self.rotary], dim=-1)
        latent_BPL = normed(latent_BPL)
        k_turned = turned(key_BPR, turns_2PR)[:, None].expand(-1, self.num_heads, -1, -1)
        q_BHPC = torch.cat([turned(q_turned, turns_2PR), q_plain], dim=-1)
        k_BHPC = torch.cat([k_turned, self._heads(self.key_up(latent_BPL))], dim=-1)
        v_BHPC = self._heads(self.value_up(latent_BPL))
        y_BHPC = F.scaled_dot_product_attention(q_BHPC, k_BHPC, v_BHPC, is_causal=True)
        return self.output(y_BHPC.transpose(1, 2).flatten(2))

    def _heads(self, x_BPN: Tensor) -> Tensor:
        return x_BPN.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def turned(x: Tensor, turns_2PR: Tensor) -> Tensor:
    """Return x [..., P, R] with its column pairs (i, i + R / 2) turned by the angles of their position, in the dtype of x."""
    cosine, sine = turns_2PR
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1).to(x.dtype)


class Experts(nn.Module):
    """A SwiGLU whose hidden vector the chosen experts modulate; [B, P, D] -> [B, P, D].

    All experts stand side by side in two matrices, and those not chosen have a share of 0: two large products, which at these
    ranks are faster than sorting by expert. The experts of the largest logits are chosen. Ours looks at activations in sixteenths
    for that, so that every device chooses alike, and so chooses others where logits are close.
    """

    def __init__(self, config: ArbConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        stacked = config.num_experts * config.expert_rank
        self.router = Linear(config.width, config.num_experts)
        self.gate = Linear(config.width, config.shared_inner)
        self.up = Linear(config.width, config.shared_inner)
        self.expert_down = Linear(config.width, stacked)
        self.expert_up = Linear(stacked, config.shared_inner)
        self.down = Linear(config.shared_inner, config.width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return the output of the chosen experts."""
        logits_BPE = wide(self.router(x_BPD))
        top_BPk, chosen_BPk = logits_BPE.topk(self.top_k, dim=-1)
        shares_BPE = torch.zeros_like(logits_BPE).scatter(-1, chosen_BPk, top_BPk.softmax(dim=-1))
        ranks_BPEr = self.expert_down(x_BPD).unflatten(-1, (self.num_experts, -1))
        weighted_BPEr = ranks_BPEr * shares_BPE.to(x_BPD.dtype)[..., None]
        hidden_BPI = F.silu(self.gate(x_BPD)) * self.up(x_BPD)
        return self.down(hidden_BPI * (1 + self.expert_up(weighted_BPEr.flatten(-2))))


class Layer(nn.Module):
    """Attention, then the experts, each on a normed residual stream."""

    def __init__(self, config: ArbConfig) -> None:
        super().__init__()
        self.attention = LatentAttention(config)
        self.moe = Experts(config)

    def forward(self, h_BPD: Tensor, turns_2PR: Tensor) -> Tensor:
        """Return the stream after this layer."""
        h_BPD = h_BPD + self.attention(normed(h_BPD), turns_2PR)
        return h_BPD + self.moe(normed(h_BPD))


class ByteHead(nn.Module):
    """Logits of the next byte; [B, P, D] -> [B, P, V]."""

    def __init__(self, config: ArbConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.head_inner)
        self.up = Linear(config.width, config.head_inner)
        self.down = Linear(config.head_inner, config.width)
        self.vocabulary = Linear(config.width, VOCABULARY_SIZE)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """Return the logits of each position's next byte."""
        n_BPD = normed(x_BPD)
        u_BPD = x_BPD + self.down(F.silu(self.gate(n_BPD)) * self.up(n_BPD))
        return self.vocabulary(normed(u_BPD))


class TrunkTwin(nn.Module):
    """The trunk of a preset with float weights: bytes in, the mean loss of the fourth and later ones out.

    Args:
        config: of the preset, without codes and loop; at most `window` positions, so that attention is causal alone.
        dtype:  of the activations.

    Shapes:  ids int64 [B, T] -> float32 [], in nats a byte (float64 for float64)
    Raises:  ValueError for a configuration that it is no twin of
    """

    def __init__(self, config: ArbConfig, num_bytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        positions = num_bytes - NGRAM + 1
        if config.num_codes or config.max_moe_iters > 1 or not config.use_moe or config.top_k < 2:
            raise ValueError("config must have experts, two or more a position, no codes and no loop")
        if positions > config.window:
            raise ValueError(f"num_bytes is {num_bytes}, but must leave at most {config.window} positions")
        self.dtype = dtype
        self.embedding = nn.Embedding(VOCABULARY_SIZE, config.embed_dim)
        self.project = Linear(NGRAM * config.embed_dim, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = ByteHead(config)
        steps_R = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
        angles_PR = torch.arange(positions, dtype=torch.float64)[:, None] * ROTARY_BASE**-steps_R
        turns_2PR = torch.stack([angles_PR.cos(), angles_PR.sin()]).to(torch.float32)
        self.register_buffer("turns_2PR", turns_2PR, persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the mean loss of the bytes from the fourth on."""
        e_BTE = self.embedding(ids_BT).to(self.dtype)
        positions = ids_BT.shape[1] - NGRAM + 1
        windows_BPK = torch.cat([e_BTE[:, place : place + positions] for place in range(NGRAM)], dim=-1)
        h_BPD = normed(self.project(windows_BPK))
        for layer in self.layers:
            h_BPD = layer(h_BPD, self.turns_2PR)
        logits_BPV = wide(self.head(h_BPD))[:, :-1]
        return F.cross_entropy(logits_BPV.flatten(0, 1), ids_BT[:, NGRAM:].flatten())


class TransformerLayer(nn.Module):
    """Causal attention and a squared-ReLU layer, each on a normed residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.output = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the stream after this layer."""
        qkv_BT3HC = self.qkv(normed(x_BTD)).unflatten(-1, (3, -1, HEAD_COLUMNS))
        q_BHTC, k_BHTC, v_BHTC = qkv_BT3HC.permute(2, 0, 3, 1, 4)
        y_BHTC = F.scaled_dot_product_attention(normed(q_BHTC), normed(k_BHTC), v_BHTC, is_causal=True)
        x_BTD = x_BTD + self.output(y_BHTC.transpose(1, 2).flatten(-2))
        return x_BTD + self.down(F.relu(self.up(normed(x_BTD))).square())


class TransformerTwin(nn.Module):
    """The byte transformer of `bench.learning` with float weights.

    Shapes:  ids int64 [B, T] -> float32 [], the mean loss of bytes 1 .. T - 1 in nats (float64 for float64)
    """

    def __init__(self, *, width: int, num_layers: int, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.bytes = nn.Embedding(NUM_BYTES, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(TransformerLayer(width) for _ in range(num_layers))
        self.head = Linear(width, NUM_BYTES)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the mean loss of each byte after the first."""
        read_BT, places_T = ids_BT[:, :-1], torch.arange(ids_BT.shape[1] - 1, device=ids_BT.device)
        x_BTD = self.bytes(read_BT).to(self.dtype) + self.positions(places_T).to(self.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV = wide(self.head(normed(x_BTD)))
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


def trunk_twin(shape: str, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """Return the twin of the trunk of a preset."""
    return TrunkTwin(train_step.config_of(train_step.TRUNK, shape), sizes["T"], dtype)


def transformer_twin(shape: str, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """Return the twin of the transformer."""
    return TransformerTwin(width=sizes["D"], num_layers=sizes["layers"], length=sizes["T"], dtype=dtype)


class TwinStep:
    """One training step of a twin, as a trainer takes it: recorded on a GPU, and a look at the loss at the end.

    Args:
        twin:     from ids to the loss, on the device of the ids.
        ids_BT:   what every step is trained on.
        compiled: whether `torch.compile` makes the kernels. A CPU has its front end trace the twin, and makes none.
        muon:     whether torch's Muon moves the matrices of the layers, and AdamW the others.
    """

    def __init__(self, twin: nn.Module, ids_BT: Tensor, *, compiled: bool, muon: bool = False) -> None:
        on_gpu = ids_BT.device.type == "cuda"
        self.twin, self.ids_BT = twin, ids_BT
        self.loss_of: Callable[[Tensor], Tensor] = twin
        if compiled:
            backend = machine.compiler_of(ids_BT.device.type)
            self.loss_of = torch.compile(twin, fullgraph=True, dynamic=False, backend=backend)
        by_muon = {
            name: each for name, each in twin.named_parameters() if muon and name.startswith("layers.")
        }
        others = [each for name, each in twin.named_parameters() if name not in by_muon]
        # capturable keeps the step count on the device, which a CUDA graph needs.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=1e-3, fused=True, capturable=on_gpu)
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(by_muon.values(), lr=1e-3, adjust_lr_fn="match_rms_adamw")
            )
            # Its rate is a number of the host, which a graph keeps. torch then refuses to record it unless its groups say this.
            self.optimizers[-1].param_groups[0]["capturable"] = on_gpu
        self.loss: Tensor | None = None
        self.take: Callable[[], None] = self._launch
        if on_gpu:
            # In these, kernels are compiled, and AdamW makes its moments.
            for _ in range(LAUNCHED_FIRST):
                self._launch()
            [graph] = recorded(self._launch)
            self.take = graph.replay

    def __call__(self) -> float:
        """Take a step, and return its loss."""
        self.take()
        assert self.loss is not None
        return self.loss.item()

    def _launch(self) -> None:
        self.twin.zero_grad(set_to_none=True)
        loss = self.loss_of(self.ids_BT)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss = loss.detach()


def _step(
    arguments: Arguments,
    sizes: Sizes,
    *,
    twin_of: Callable[[str, Sizes, torch.dtype], nn.Module],
    compiled: bool,
    muon: bool,
) -> Callable[[], Any]:
    shape, ids_BT = arguments[0]
    dtype = torch.bfloat16 if ids_BT.device.type == "cuda" else torch.float32
    twin = twin_of(shape, sizes, dtype).to(ids_BT.device)
    return TwinStep(twin, ids_BT, compiled=compiled, muon=muon)


def _peers(
    twin_of: Callable[[str, Sizes, torch.dtype], nn.Module], twins: Mapping[str, bool], *, muon: bool = False
) -> tuple[Peer, ...]:
    optimizer = "Muon at a rate that stays" if muon else "fused AdamW"
    return tuple(
        Peer(
            name,
            partial(_step, twin_of=twin_of, compiled=compiled, muon=muon),
            lambda s: 0,
            note=f"equally many float weights, not equal results: float32 masters, bfloat16 products, {optimizer}, recorded",
            # Another rule moves other weights: that the function is the same is checked by bench/test_twin.py.
            checked=False,
        )
        for name, compiled in twins.items()
    )


PEERS = {
    train_step.TRUNK: _peers(trunk_twin, TWINS),
    train_step.TRANSFORMER: (
        *_peers(transformer_twin, TWINS),
        *_peers(transformer_twin, MUON_TWINS, muon=True),
    ),
}
"""Peers by op."""
