"""How a trained model uses its codes and experts on text that it did not learn from: the figures that a rule for them is judged by.

    python -m bench.codes --run runs/mine                               # the run's own validation text
    python -m bench.codes --run runs/mine --data FILE --json codes.json

For each codebook the table says how many codes the positions of some windows use, the perplexity of their use, and the error:
the mean squared distance of the vectors from their codes over the mean square of the vectors. Beside it stands how many different
runs of 3 and of 6 bytes these positions have. A code is found from six bytes, so no table has more codes in use than the text
has runs of six. For each layer it says how busy the idlest and the busiest expert are, over an even share.
Legend: R vectors, C code width, N codes, E experts, W windows of T bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.settings import values_vouched_for
from arbitor.optimized.training.data import load_corpus, split_corpus, validation_windows
from arbitor.optimized.training.evaluate import NATS_PER_BIT
from arbitor.optimized.training.model_folder import open_model, trained_context
from arbitor.optimized.training.runtime import choose_runtime
from arbitor.reference.config import NGRAM
from arbitor.reference.graph import ArbModel
from arbitor.reference.graph.codebook import TernaryVQCodebook
from arbitor.reference.graph.moe import SharedProjectionMoE
from bench import machine, parts

RUNS = (NGRAM, 2 * NGRAM)
"""Lengths of runs of bytes that are counted: those of a position, and those that a code is found from."""


@dataclass
class Seen:
    """What passes of a model have seen.

    Fields:
        uses_N:   int64, how often each code was found, by the name of its codebook.
        squares:  sums of |z - c|^2 and of |z|^2, float64 [2], by the name of the codebook.
        load_E:   int64, how often each expert was chosen, by the name of its layer.
    """

    uses_N: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    load_E: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(model: ArbModel) -> Iterator[Seen]:
    """Watch the codes that are found and the experts that are chosen in the passes of a block."""
    seen = Seen()
    undo = []
    for name, part in model.table_modules().items():
        if isinstance(part, TernaryVQCodebook):
            part.__dict__["quantize"] = _watch_codes(name, part, seen)
            undo.append((part, "quantize"))
        elif isinstance(part, SharedProjectionMoE):
            for method in ("modulations", "all_modulations"):
                part.__dict__[method] = _watch_experts(name, part, seen, getattr(part, method))
                undo.append((part, method))
    try:
        yield seen
    finally:
        for part, method in undo:
            del part.__dict__[method]


def _watch_codes(name: str, table: TernaryVQCodebook, seen: Seen) -> Any:
    quantize = table.quantize

    def run(z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ids, c, losses = quantize(z)
        wide = z.detach().to(torch.float64)
        squares = torch.stack([(wide - c.detach()).square().sum(), wide.square().sum()])
        uses_N = torch.bincount(ids.flatten(), minlength=table.num_codes)
        seen.uses_N[name] = seen.uses_N.get(name, 0) + uses_N
        seen.squares[name] = seen.squares.get(name, 0) + squares
        return ids, c, losses

    return run


def _watch_experts(name: str, moe: SharedProjectionMoE, seen: Seen, modulations: Any) -> Any:
    def run(x: Tensor, logits_BPE: Tensor, experts_BPk: Tensor) -> Tensor:
        load_E = torch.bincount(experts_BPk.flatten(), minlength=moe.num_experts)
        seen.load_E[name] = seen.load_E.get(name, 0) + load_E
        return modulations(x, logits_BPE, experts_BPk)

    return run


def perplexity(counts: Tensor) -> float:
    """Return exp of the entropy of some counts: how many equally frequent ones would be as varied. Zeros count for nothing."""
    shares = counts[counts > 0].to(torch.float64)
    shares = shares / shares.sum()
    return float((-(shares * shares.log()).sum()).exp())


def runs_of_bytes(windows_WT: Tensor, length: int) -> dict[str, float]:
    """Return how many different runs of so many bytes end at the positions of some windows, and their perplexity.

    A position with fewer bytes before it has a run of three, as its code has.
    """
    more = length - NGRAM
    padded_WT = torch.nn.functional.pad(windows_WT.cpu() + 1, (more, 0))
    runs_WPL = padded_WT.unfold(1, length, 1).clone()
    runs_WPL[:, :more, :more] = 0
    runs, counts = runs_WPL.flatten(0, 1).unique(dim=0, return_counts=True)
    return {"different": runs.shape[0], "perplexity": perplexity(counts)}


def measure(model: ArbModel, windows_WT: Tensor, *, batch: int) -> dict[str, Any]:
    """Return how a model uses its codes and experts on some windows of bytes, int64 [W, T] on the CPU, and what runs these have."""
    positions = windows_WT.shape[0] * (windows_WT.shape[1] - NGRAM + 1)
    runs = {str(length): runs_of_bytes(windows_WT, length) for length in RUNS}
    return {"positions": positions, "runs": runs, **use_of(model, windows_WT, batch=batch)}


def use_of(model: ArbModel, windows_WT: Tensor, *, batch: int) -> dict[str, Any]:
    """Return the bits per byte of a model on some windows of bytes, and how it uses its codes and experts on them."""
    nats, device = 0.0, model.voting.faults.device
    with torch.no_grad(), watched(model) as seen:
        for windows_BT in windows_WT.split(batch):
            nats += model.loss(windows_BT.to(device)).item() * windows_BT.shape[0]
    codebooks = {
        name: {
            "codes": uses_N.numel(),
            "vectors": int(uses_N.sum()),
            "used": int(uses_N.count_nonzero()),
            "perplexity": perplexity(uses_N),
            "error": float(seen.squares[name][0] / seen.squares[name][1]),
        }
        for name, uses_N in seen.uses_N.items()
    }
    experts = {
        name: {
            "load": load_E.tolist(),
            "min_over_mean": float(load_E.min() / load_E.double().mean()),
            "max_over_mean": float(load_E.max() / load_E.double().mean()),
        }
        for name, load_E in seen.load_E.items()
    }
    bpb = nats / windows_WT.shape[0] / NATS_PER_BIT
    return {"val_bpb": bpb, "codebooks": codebooks, "experts": experts}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what was measured as Markdown."""
    yield f"{found['positions']:,} positions, {found['val_bpb']:.4f} bits per byte"
    yield ""
    yield "| codebook | codes | used | perplexity | error |"
    yield "|---|---:|---:|---:|---:|"
    for length, run in found["runs"].items():
        yield f"| runs of {length} bytes | | {run['different']:,} | {run['perplexity']:,.0f} | |"
    for name, use in found["codebooks"].items():
        yield f"| {name} | {use['codes']:,} | {use['used']:,} | {use['perplexity']:,.0f} | {use['error']:.4f} |"
    yield ""
    yield "| experts | idlest over an even share | busiest |"
    yield "|---|---:|---:|"
    for name, load in found["experts"].items():
        yield f"| {name} | {load['min_over_mean']:.3f} | {load['max_over_mean']:.2f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a run, print the tables, and write them as JSON if a file is named."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.codes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="a run, a folder of a model, or a checkpoint")
    parser.add_argument(
        "--data",
        help="a file, a folder or `stdlib` [what the run was trained on]; its validation part counts",
    )
    parser.add_argument("--positions", type=int, default=100_000, help="at most so many [100000]")
    parser.add_argument("--batch", type=int, default=32, help="windows at a time [32]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args(arguments)
    runtime = choose_runtime(options.device, None, None)
    warn = lambda sentence: print(sentence, file=sys.stderr)  # noqa: E731
    with values_vouched_for(), open_model(options.run, runtime, warn) as (model, checkpoint):
        context = trained_context(checkpoint)
        data = options.data or checkpoint.run.get("data")
        if context is None or data is None:
            parser.error(
                f"argument --run: is '{options.run}', which does not say what windows it was trained on"
            )
        corpus = load_corpus(data)
        least = context - NGRAM + 1
        if options.positions < least:
            parser.error(
                f"argument --positions: is {options.positions}, but must be at least {least}, those of a window"
            )
        count = options.positions // least
        windows_WT = validation_windows(corpus, split_corpus(corpus, context), count=count, context=context)
        found = measure(model, windows_WT, batch=options.batch)
        head = {"device": machine.device_name(), "data": data, "steps": checkpoint.step}
        parts.write(options.json, {**head, "state_sha256": checkpoint.state_sha256, **found})
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
