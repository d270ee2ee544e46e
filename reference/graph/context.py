"""The context that the modules of one model share: op set, configuration, device, dtype, seed, votes, and numbers of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import ArbConfig
from arbitor.reference.constants import TRITS_PER_BYTE
from arbitor.reference.graph.op_set import OpSet
from arbitor.reference.graph.spread import Spread
from arbitor.reference.graph.voting import Voting, gradient_dtype
from arbitor.reference.types import TernaryWeight


class GraphContext:
    """The context of a model: one object that every module is built with and asks. It is copied and pickled with the model.

    Attributes:
        config:      shape and rules.
        device:      device of the model.
        dtype:       dtype of activations.
        seed:        seed of the starting weights and of the dither.
        voting:      how weights vote, and the notes that passes left for the next step.
        num_weights: number of weights so far.
        kept_rows:   by tensor id the rows whose accumulators this rank keeps, of weights of which other ranks keep some (`Ranks`).
        codes_over:  the number of this rank, and how many ranks the rows of codebooks and of their edges are spread over.
        experts_over: the same for experts.
        moving:      whether the modules are being moved right now (`graph.module.Part`).

    Raises:
        TypeError or ValueError: a dtype or seed that is not allowed, or a dtype that the op set does not compute in.
    """

    def __init__(
        self,
        ops: ModuleType,
        config: ArbConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int,
        kept_rows: Mapping[int, range] | None = None,
        codes_over: tuple[int, int] = (0, 1),
        experts_over: tuple[int, int] = (0, 1),
    ) -> None:
        checks.integer("seed", seed, 0, 2**64 - 1)
        self.op_set = OpSet(ops)
        self.config = config
        self.device = torch.device(device)
        self.check_dtype(dtype)
        self.dtype = dtype
        self.seed = seed
        self.voting = Voting(self.op_set, config, seed=seed, device=device, dtype=dtype)
        self.num_weights = 0
        self.kept_rows = kept_rows or {}
        self.codes_over, self.experts_over = codes_over, experts_over
        self.moving = False
        self._warned_of_autocast = False

    @property
    def ops(self) -> ModuleType:
        """The op set that computes."""
        return self.op_set.ops

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a dtype of activations that no op set computes in, or float64 if this op set does not.

        An op of the op set, called with no rows, tells whether it computes in float64.
        """
        checks.one_of("dtype", dtype, checks.FLOAT_DTYPES)
        if dtype is not torch.float64:
            return
        weight = self.constant_weight((1, 1), trit=1, exponent=0)
        try:
            self.ops.linear(torch.empty(0, 1, dtype=dtype, device=self.device), weight)
        except TypeError as error:
            raise TypeError(
                f"dtype is {dtype}, but must be torch.float32 or torch.bfloat16 for {self.op_set.name}"
            ) from error

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Let activations be of another dtype from now on; refuse one that is not allowed."""
        self.check_dtype(dtype)
        self.dtype = dtype
        self.voting.dtype = gradient_dtype(dtype)

    def dtype_under(self, change: Callable[[Tensor], Tensor]) -> torch.dtype:
        """Return the dtype that activations shall have after torch applies `change` to all tensors of a module.

        Raises TypeError if `change` would turn integers into another dtype. All tensors of a model are integers.
        """
        integers = change(torch.empty(0, dtype=torch.int8, device=self.device)).dtype
        if integers is not torch.int8:
            raise TypeError(
                f"the model's tensors would become {integers}, but must stay the integers that they are"
            )
        return change(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

    def own_dtype(self) -> AbstractContextManager[object]:
        """Return a context in which torch.autocast is off. If it was on, one warning says so."""
        kind = self.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return nullcontext()
        if not self._warned_of_autocast:
            self._warned_of_autocast = True
            warnings.warn(
                "torch.autocast is on, but ternary layers compute as if it were off: for another dtype, "
                "call .to(torch.bfloat16) of the model",
                stacklevel=4,
            )
        return torch.autocast(kind, enabled=False)

    def next_tensor_id(self) -> int:
        """Return the index of the next weight in definition order, which is its tensor id in the dither."""
        self.num_weights += 1
        return self.num_weights - 1

    def spread_of_codes(self, num_codes: int) -> Spread | None:
        """Return how the rows of a table of codes, or of their edges, are spread over ranks; None where this rank keeps them all.

        A table of few rows, which would leave a rank without any, is kept whole by every rank.
        """
        number, count = self.codes_over
        return Spread(num_codes, number, count) if 1 < count <= num_codes // TRITS_PER_BYTE else None

    def spread_of_experts(self, num_experts: int, num_outputs: int) -> Spread | None:
        """Return how the matrices of experts are spread over ranks; None where this rank keeps all of them.

        Experts that are fewer than the ranks are kept by every rank.
        """
        number, count = self.experts_over
        if not 1 < count <= num_experts:
            return None
        return Spread(num_experts * num_outputs, number, count, block=num_outputs)

    @property
    def has_spread(self) -> bool:
        """Whether ranks keep rows for each other, so that each must take part in every pass."""
        return max(self.codes_over[1], self.experts_over[1]) > 1

    def random_weight(self, shape: tuple[int, int], *, std: float, tensor_id: int) -> TernaryWeight:
        """Return a weight of standard deviation `std` (to within half a power of two), in canonical form."""
        group_size = self.config.group_size
        weight = self.ops.initial_weight(
            shape, std=std, seed=self.seed, tensor_id=tensor_id, group_size=group_size, device=self.device
        )
        return weight.with_mantissa(self.config.mantissa_bits)

    def constant_weight(self, shape: tuple[int, int], *, trit: int, exponent: int) -> TernaryWeight:
        """Return a weight that is trit * 2**exponent everywhere, in canonical form."""
        group_size = self.config.group_size
        weight = self.ops.constant_weight(
            shape, trit=trit, exponent=exponent, group_size=group_size, device=self.device
        )
        return weight.with_mantissa(self.config.mantissa_bits)
