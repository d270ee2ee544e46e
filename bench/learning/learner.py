"""One model, trained by one rule: on a GPU the whole step is a CUDA graph, so that the host's speed does not count.

Legend: B batch, T bytes of a window, W validation windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.training.census import by_kind
from arbitor.optimized.training.passes import Passes, RecordedPasses, Unpacking
from arbitor.optimized.training.recording import in_branches
from arbitor.reference.config import ArbConfig
from arbitor.reference.graph import ArbModel, GraphContext
from arbitor.reference.graph.model import LOSS_REFERENCE
from arbitor.reference.graph.stateful import Stateful
from arbitor.reference.presets import preset
from bench import machine
from bench.codes import use_of
from bench.learning.rules import (
    FIXED_SCALES,
    FLOAT_BYTES,
    MUON_BYTES,
    FloatOps,
    GroupedStraightThroughOps,
    Rule,
    StraightThroughOps,
    integer_bytes,
)
from bench.learning.transformer import KIND_OF_PART, ByteTransformer

BETAS = (0.9, 0.95)
"""Of AdamW."""

EAGER_STEPS = 3
"""Steps of a process before the first that is recorded: libraries set themselves up, kernels are compiled."""


@dataclass(frozen=True)
class Architecture:
    """What is trained: a byte transformer of so many layers and so wide, or the graph of a configuration."""

    name: str
    width: int = 384
    num_layers: int = 4
    context: int = 256
    batch: int = 64
    config: ArbConfig | None = None

    @property
    def has_codes(self) -> bool:
        """Whether the model has codes, which no float rule can train."""
        return self.config is not None and self.config.num_codes > 0


class Learner:
    """A model and how it takes a step.

    Attributes:
        model:       on the op set of its rule.
        num_weights: trainable ones.
        state_bytes: what training keeps between steps.
    """

    def __init__(
        self,
        architecture: Architecture,
        rule: Rule,
        *,
        seed: int,
        device: str,
        capture: bool = True,
        compiled: bool = False,
    ) -> None:
        """Begin.

        Args:
            architecture, rule, seed, device: what is trained, how, from which start, and where.
            capture:  whether steps on a GPU are recorded and replayed.
            compiled: whether `torch.compile` makes the kernels around the products of a byte transformer.
        """
        self.architecture, self.rule, self.device = architecture, rule, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ops = self._op_set()
        self.config = self._config()
        self.model = self._model(seed)
        self.rate = torch.zeros((), device=device)
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        self.ids_BT = torch.zeros(architecture.batch, architecture.context, dtype=torch.int64, device=device)
        # Stacks of experts that Muon moves, each with its matrices, which share its memory.
        self.stacks: list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]] = []
        self.optimizers = self._optimizers()
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # torch's Muon takes its rate from the host in every step.
        self.capture = capture and device == "cuda" and not rule.muon
        # Steps taken, and those of them that an earlier process took.
        self.taken, self.began, self.last_loss = 0, 0, LOSS_REFERENCE
        self.passes = self._passes()
        self.unpacking = Unpacking(self.model)
        self.loss_of: Callable[[Tensor], Tensor] = self.model.loss
        if compiled:
            backend = machine.compiler_of(device)
            self.loss_of = torch.compile(self.model.loss, fullgraph=True, dynamic=False, backend=backend)
        trained = {name: m.weight for name, m in self.model.ternary_modules().items() if not m.frozen}
        self.num_weights = sum(math.prod(weight.shape) for weight in trained.values())
        self.state_bytes = integer_bytes(trained) if rule.kind == "integer" else self._float_bytes()
        self.state_bytes += sum(
            table.nbytes for part in self.model.table_modules().values() for table in part.tables().values()
        )

    def step(self, ids_BT: Tensor, share: float) -> Tensor:
        """Take one step at a share of the rule's rate, and return its loss, []."""
        if self.passes is not None:
            return self._take_passes(self.passes, ids_BT, share)
        self.ids_BT.copy_(ids_BT)
        height = self.rule.rate * (1.0 if self.optimizers else self.config.theta)
        self.rate.fill_(share * height)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.Muon):
                optimizer.param_groups[0]["lr"] = share * height
        self.step_number.fill_(self.taken)
        size = self._vote_size()
        if not self.capture or self.taken - self.began < EAGER_STEPS:
            loss = self._take(size)
        else:
            if size not in self.recorded:
                self.recorded[size] = self._record(size)
            graph, loss = self.recorded[size]
            graph.replay()
        # Only this rule asks for the loss.
        if self.config.vote_rule == "sign":
            self.last_loss = loss.item()
        self.taken += 1
        return loss

    def bits_per_byte(self, windows_WT: Tensor) -> float:
        """Return the mean over validation windows."""
        nats = 0.0
        with torch.no_grad():
            for windows_BT in windows_WT.split(self.architecture.batch):
                nats += self.model.loss(windows_BT.to(self.device)).item() * windows_BT.shape[0]
        return nats / windows_WT.shape[0] / math.log(2)

    def use(self, windows_WT: Tensor) -> dict[str, Any] | None:
        """Return the bits per byte of some windows, and how codes and experts are used on them; None for a model without either."""
        if not isinstance(self.model, ArbModel) or not self.model.table_modules():
            return None
        return use_of(self.model, windows_WT, batch=self.architecture.batch)

    def trits(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of the trits of each weight, to be given to `flip_rates`; nothing where weights are float."""
        return {} if self.rule.kind == "float" else self.model.snapshot_trits()

    def flip_rates(self, before: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the share of trits that differ from those of `trits`, by kind of weight (docs/training.md)."""
        weights = {name: self.model.ternary_modules()[name].weight for name in before}
        if self.rule.kind == "straight-through":
            changed = {
                name: (before[name]["value"].sign() != weight.tensors()["value"].sign()).sum()
                for name, weight in weights.items()
            }
        else:
            changed = self.model.changed_trits(before)
        kinds: dict[str, list[str]] = {}
        if isinstance(self.model, ArbModel):
            kinds = by_kind(before)
        else:
            for name in before:
                kinds.setdefault(KIND_OF_PART[name.split(".")[-1]], []).append(name)
        return {
            kind: int(torch.stack([changed[name] for name in names]).sum())
            / sum(math.prod(weights[name].shape) for name in names)
            for kind, names in kinds.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a step reads and the steps before have made, by name: the state that a run goes on from.

        Buffers of another dtype than those of weights and tables are made from masters, and are left out.
        """
        found = {
            name: tensor for name, tensor in self.model.named_buffers() if not tensor.is_floating_point()
        }
        found["faults"] = self.model.voting.faults
        if self.optimizers:
            found |= {f"master.{n}": weight.master for n, weight in enumerate(self.ops.weights)}
        for place, optimizer in enumerate(self.optimizers):
            for n, master in enumerate(optimizer.param_groups[0]["params"]):
                for name, tensor in self._state_of(optimizer, master).items():
                    found[f"optimizer.{place}.{n}.{name}"] = tensor
        return found

    def _state_of(self, optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
        """Return what an optimizer keeps of a weight. It begins with zeros, which is how torch begins with its first step."""
        if master not in optimizer.state:
            names = (
                ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
            )
            optimizer.state[master] = {name: torch.zeros_like(master) for name in names}
            if "exp_avg" in names:
                on = master.device if self.device == "cuda" else "cpu"
                optimizer.state[master]["step"] = torch.zeros((), dtype=torch.float32, device=on)
        return dict(optimizer.state[master])

    def loaded(self, taken: int, loss: float | None) -> None:
        """Go on from `taken` steps, whose state was written to `tensors`, with the loss of the last of them."""
        self.taken = self.began = taken
        if loss is not None:
            self.last_loss = loss
        if self.optimizers:
            self.ops.refresh()

    def _passes(self) -> Passes | None:
        """Return the passes of the product, by which it trains the graph with all of its losses; None for another model or rule."""
        if self.rule.kind != "integer" or not isinstance(self.model, ArbModel):
            return None
        # As `arb train`: the sign rule asks for the loss on the host, and its passes are not recorded.
        recorded = self.capture and self.config.vote_rule == "stochastic"
        return RecordedPasses(self.model) if recorded else Passes(self.model)

    def _take_passes(self, passes: Passes, ids_BT: Tensor, share: float) -> Tensor:
        nats = passes.take(ids_BT, rate=share * self.rule.rate * self.config.theta, step=self.taken)
        passes.step()
        self.taken += 1
        return torch.tensor(math.nan if nats is None else nats)

    def _take(self, size: int) -> Tensor:
        with self.unpacking():
            loss = self.loss_of(self.ids_BT)
            # What a recorded step votes is undone by nobody, and a run whose step raises is over.
            with self.model.voting.taking(rate=self.rate, step=self.step_number, size=size, undo=False):
                loss.backward()
        self.model.step()
        for master, matrices in self.stacks:
            if master.grad is not None:
                for matrix, grad in zip(matrices, master.grad.chunk(len(matrices)), strict=True):
                    matrix.grad = grad
            master.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.optimizers:
            self.ops.refresh()
        return loss.detach()

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        branches = in_branches(self.model.voting) if self.rule.kind == "integer" else nullcontext()
        with branches, torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            loss = self._take(size)
        return graph, loss

    def _vote_size(self) -> int:
        """Return the size of sign votes by the loss of the step before: that of this one is known after it was recorded."""
        if self.config.vote_rule != "sign":
            return 1
        from arbitor.reference.ops import step_from_loss

        return step_from_loss(self.last_loss, LOSS_REFERENCE, self.config.max_vote_step)

    def _op_set(self) -> Any:
        if self.rule.kind == "float":
            return FloatOps(self.dtype)
        if self.rule.kind == "straight-through":
            return (GroupedStraightThroughOps if self.rule.groups else StraightThroughOps)(self.dtype)
        if self.device == "cuda":
            from arbitor.optimized import ops as optimized_ops

            return optimized_ops
        from arbitor.reference import ops as reference_ops

        return reference_ops

    def _config(self) -> ArbConfig:
        changes = dict(self.rule.config)
        if self.rule.kind != "integer":
            changes |= {"vote_rule": "stochastic", "orthogonal_steps": 0, **FIXED_SCALES}
        return replace(self.architecture.config or preset("tiny"), **changes)

    def _model(self, seed: int) -> Stateful:
        parts: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "seed": seed}
        if self.architecture.config is not None:
            return ArbModel(self.config, ops=self.ops, **parts)
        context = GraphContext(self.ops, self.config, **parts)
        shape = self.architecture
        return ByteTransformer(context, width=shape.width, num_layers=shape.num_layers, length=shape.context)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW for every weight; or Muon for those whose gradients integer rules make orthogonal, AdamW for the rest."""
        if self.rule.kind == "integer":
            return []
        stacked, adamw = self._masters()
        muon: list[Tensor] = []
        for master, num_matrices in stacked:
            matrices = [torch.nn.Parameter(part) for part in master.detach().chunk(num_matrices)]
            if num_matrices > 1:
                self.stacks.append((master, matrices))
            muon += matrices if num_matrices > 1 else [master]
        on_gpu = self.device == "cuda"
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                adamw,
                lr=self.rate,
                betas=BETAS,
                weight_decay=0.0,
                fused=on_gpu,
                foreach=False,
                capturable=on_gpu,
            )
        ]
        if muon:
            found.append(torch.optim.Muon(muon, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        return found

    def _masters(self) -> tuple[list[tuple[torch.nn.Parameter, int]], list[Tensor]]:
        """Return the float32 weights that Muon moves, each with the number of its matrices, and those that AdamW moves."""
        muon: list[tuple[torch.nn.Parameter, int]] = []
        adamw: list[Tensor] = []
        for module in self.model.ternary_modules().values():
            if module.frozen:
                continue
            master = module.weight.master  # type: ignore[attr-defined]
            if self.rule.muon and getattr(module, "orthogonal", False):
                muon.append((master, getattr(module, "num_groups", 1)))
            else:
                adamw.append(master)
        return muon, adamw

    def _float_bytes(self) -> float:
        muon, adamw = self._masters()
        num_muon, num_adamw = sum(master.numel() for master, _ in muon), sum(each.numel() for each in adamw)
        return float(MUON_BYTES * num_muon + FLOAT_BYTES * num_adamw)
