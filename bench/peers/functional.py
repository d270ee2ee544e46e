"""torch.nn.functional and elementwise torch: convolution, RMSNorm, embedding, denoise.

Legend: as in bench/inputs; V entries of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from bench.inputs import Arguments, Sizes
from bench.inputs.conv import positions
from bench.peers import Peer, dense

# The default of the ops.
EPS = 1e-6


def _taps(weight: Any, kernel_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as [N, C, J]: column c * J + j is channel c, tap j."""
    num_rows, num_columns = weight.shape
    return dense(weight, dtype).reshape(num_rows, num_columns // kernel_size, kernel_size)


def _conv(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (x, weight), at = arguments
    w = _taps(weight, at["kernel_size"], x.dtype)
    return lambda: F.conv1d(x, w, stride=at["stride"], padding=at["padding"])


def _conv_input_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, weight), at = arguments
    w = _taps(weight, at["kernel_size"], grad.dtype)
    shape = (grad.shape[0], w.shape[1], at["length"])
    return lambda: conv_grad.conv1d_input(shape, w, grad, stride=at["stride"], padding=at["padding"])


def _conv_weight_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad, x), at = arguments
    shape = (grad.shape[1], x.shape[1], at["kernel_size"])
    flat = (shape[0], shape[1] * shape[2])
    return lambda: conv_grad.conv1d_weight(
        x, shape, grad, stride=at["stride"], padding=at["padding"]
    ).reshape(flat)


def _conv_bytes(s: Sizes) -> int:
    activations = s["B"] * (s["C"] * s["L"] + s["N"] * positions(s))
    return s["float_bytes"] * (activations + s["N"] * s["C"] * s["J"])


def _norm(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    x, weight = arguments[0]
    w = dense(weight, x.dtype)[0]
    return lambda: F.rms_norm(x, w.shape, w, EPS)


def _added_norm(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    x, y, weight = arguments[0]
    w = dense(weight, x.dtype)[0]

    def added() -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return total, F.rms_norm(total, w.shape, w, EPS)

    return added


def _norm_input_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, x, weight = arguments[0]
    w, x = dense(weight, x.dtype)[0], x.clone().requires_grad_()
    y = F.rms_norm(x, w.shape, w, EPS)
    return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)[0]


def _norm_weight_grad(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    grad, x = arguments[0]
    w = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
    y = F.rms_norm(x, w.shape, w, EPS)
    return lambda: torch.autograd.grad(y, w, grad, retain_graph=True)[0][None]


def muon_ops(s: Sizes) -> int:
    """Return the operations of Muon's iterations, with every product in full."""
    rows = s["N"] // s["E"]
    side = min(rows, s["K"])
    return s["iterations"] * s["E"] * (4 * rows * s["K"] * side + 2 * side**3)


def _newton_schulz(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    """Return Muon's iteration as it is commonly written: bfloat16 throughout."""
    (grad,), options = arguments
    matrices = grad.unflatten(0, (options["num_groups"], -1))
    tall = matrices.shape[1] > matrices.shape[2]

    def run() -> torch.Tensor:
        x = matrices.mT if tall else matrices
        x = x / x.float().square().sum(dim=(1, 2), keepdim=True).sqrt().to(x.dtype)
        for _ in range(options["iterations"]):
            s = x @ x.mT
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        return (x.mT if tall else x).reshape(grad.shape)

    return run


def _norm_bytes(activations: int) -> Callable[[Sizes], int]:
    return lambda s: s["float_bytes"] * (activations * s["M"] + 1) * s["K"]


def _embedding(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (ids, weight), options = arguments
    table = dense(weight, options["dtype"])
    return lambda: F.embedding(ids, table)


def _embedding_backward(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    ids, grad = arguments[0]
    return lambda: torch.ops.aten.embedding_dense_backward(grad, ids, sizes["N"], -1, False)


def _index_add(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    ids, grad = arguments[0]
    shape = (sizes["N"], grad.shape[-1])
    return lambda: torch.zeros(shape, dtype=grad.dtype, device=grad.device).index_add_(0, ids, grad)


def _used_rows(table_grad: Any, expected: Any) -> tuple[Any, Any]:
    """Return the gradients of the rows that a batch used, from a gradient of the table and from the op's rows."""
    rows, grads = expected
    used = rows >= 0
    return table_grad[rows[used]], grads[used]


def _table_grad_bytes(s: Sizes) -> int:
    """Return ids and gradients read, a gradient of the whole table written."""
    return s["M"] * 8 + s["float_bytes"] * (s["M"] + s["N"]) * s["K"]


def _denoise(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (latent, pred), options = arguments
    alpha = options["alpha"]
    return lambda: (latent - (1.0 - alpha) * pred) / math.sqrt(alpha)


def _denoise_backward(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (grad,), options = arguments
    root = math.sqrt(options["alpha"])
    return lambda: (grad / root, grad * (-(1.0 - options["alpha"]) / root))


def _denoise_loop(arguments: Arguments, sizes: Sizes) -> Callable[[], Any]:
    (latent, tokens, *weights), options = arguments
    w_in, w_query, w_steps, w_out = (dense(weight, latent.dtype) for weight in weights)
    alphas, threshold = options["alphas"], options["halt_threshold"]

    def loop() -> torch.Tensor:
        z, total, left = latent, torch.zeros_like(latent), torch.ones_like(latent[:, :1])
        for step, alpha in enumerate(alphas):
            n = F.rms_norm(z @ w_in.T, (w_in.shape[0],), eps=EPS)
            q = n @ w_query.T + w_steps[step]
            c = F.scaled_dot_product_attention(q[:, None], tokens, tokens)[:, 0]
            pred = F.silu(n + c) @ w_out.T
            z = (z - (1.0 - alpha) * pred) / math.sqrt(alpha)
            if threshold is not None:
                signal, noise = (value.square().mean(dim=1, keepdim=True) for value in (z, pred))
                p = (signal + EPS) / (signal + noise + EPS)
                goes_on = (1.0 - left + p < threshold) & (step + 1 < len(alphas))
                total = total + torch.where(goes_on, p, left) * z
                left = torch.where(goes_on, left - p, 0.0)
        return z if threshold is None else total

    return loop


def _denoise_loop_bytes(s: Sizes) -> int:
    """Return latents and tokens once, and every dense weight once a step: they do not fit a cache."""
    weights = s["T"] * (2 * s["L"] + s["D"]) * s["D"]
    return s["float_bytes"] * (s["B"] * (2 * s["L"] + s["P"] * s["D"]) + weights)


def _elementwise_bytes(s: Sizes) -> int:
    return 3 * s["float_bytes"] * s["M"] * s["K"]


_DENSE_TABLE = "writes a gradient of the whole table, the op one row an id"

PEERS = {
    "conv1d": (Peer("F.conv1d bf16", _conv, _conv_bytes),),
    "conv1d_input_grad": (Peer("conv1d_input bf16", _conv_input_grad, _conv_bytes),),
    "conv1d_weight_grad": (
        Peer("conv1d_weight bf16", _conv_weight_grad, _conv_bytes, note="writes bfloat16, the op float32"),
    ),
    "orthogonalize": (
        Peer(
            "Muon's iteration, bf16",
            _newton_schulz,
            lambda s: 2 * s["float_bytes"] * s["N"] * s["K"],
            muon_ops,
            note="rounds more often",
            checked=False,
        ),
    ),
    "rms_norm": (Peer("F.rms_norm bf16", _norm, _norm_bytes(2)),),
    "add_rms_norm": (Peer("+, F.rms_norm bf16", _added_norm, _norm_bytes(5)),),
    "rms_norm_input_grad": (Peer("F.rms_norm backward", _norm_input_grad, _norm_bytes(3)),),
    "rms_norm_weight_grad": (Peer("F.rms_norm backward", _norm_weight_grad, _norm_bytes(2)),),
    "embedding": (
        Peer("F.embedding bf16", _embedding, lambda s: s["M"] * (8 + 2 * s["float_bytes"] * s["K"])),
    ),
    "embedding_row_grads": (
        Peer(
            "embedding backward",
            _embedding_backward,
            _table_grad_bytes,
            note=_DENSE_TABLE,
            matched=_used_rows,
            # It counts its segments on the host.
            capturable=False,
        ),
        Peer("index_add", _index_add, _table_grad_bytes, note=_DENSE_TABLE, matched=_used_rows),
    ),
    "denoise_loop": (Peer("torch dense float32", _denoise_loop, _denoise_loop_bytes),),
    "denoise_step": (Peer("torch elementwise", _denoise, _elementwise_bytes),),
    "denoise_step_backward": (Peer("torch elementwise", _denoise_backward, _elementwise_bytes),),
}
"""Peers by op."""
