"""Codebooks of the graph: vectors become codes, codes become motifs, and three modalities share one space of ids.

Legend: B batch, P positions, D width, C code width, N codes, R vectors since the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arbitor.reference import checks
from arbitor.reference.config import NGRAM
from arbitor.reference.constants import USAGE_MAX
from arbitor.reference.dtypes import wide_dtype
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.ledger import KVLedger
from arbitor.reference.graph.module import ArbModule, PartDict
from arbitor.reference.graph.spread import queries, revival, search, vectors
from arbitor.reference.graph.tables import TableModule, when_voting
from arbitor.reference.graph.uncompiled import uncompiled
from arbitor.reference.types import TernaryWeight

MOTIF_EXPONENT = -2
"""Exponent of a motif's scale. A motif that is added to its position has a quarter of the position's scale. The measurement is in
docs/spec/codebook.md."""


class TernaryVQCodebook(TernaryEmbedding, TableModule):
    """A table of codes that vectors are compared with, and a count of how often each code was the nearest.

    Math:    search: the nearest code of all codes, or of those in the buckets that the signs of z name
             after a step: u_n += uses of code n in accepted backward passes. Then, in a window of the codes that moves on with
             the steps, codes with u_n = 0 become the vectors that lie farthest from their codes, and other counts halve
    Shapes:  search [..., C] -> int64 [...]; forward int64 [...] -> [..., C]; usage int16 [N]
    Start:   buckets by sign, exponents 0, counts 1
    Source:  docs/spec/codebook.md; REFACTOR14 (TernaryVQCodebook)
    """

    def __init__(self, context: GraphContext, num_codes: int, width: int) -> None:
        config = context.config
        # As many buckets as the table can fill.
        sign_bits = min(config.sign_bits, num_codes.bit_length() - 1, width)
        spread = context.spread_of_codes(num_codes)

        def start(tensor_id: int) -> TernaryWeight:
            whole = context.ops.initial_codebook(
                (num_codes, width),
                sign_bits=sign_bits,
                seed=context.seed,
                tensor_id=tensor_id,
                group_size=config.group_size,
                device=context.device,
            )
            return whole if spread is None else spread.part(whole)

        super().__init__(context, num_codes, width, start=start)
        self.spread = spread
        self.num_codes, self.sign_bits = num_codes, sign_bits
        self.num_probes = min(max(config.num_probes, 1), 2**sign_bits)
        self.by_candidates = config.code_search == "candidates" and sign_bits > 0
        ones_N = torch.ones(self.weight.shape[0], dtype=torch.int16, device=context.device)
        self.add_table("usage", ones_N, 0, USAGE_MAX)

    def search(self, z: Tensor) -> Tensor:
        """Return the code of each vector, int64 [...]."""
        return uncompiled(self._search, z.detach())

    def _search(self, z: Tensor) -> Tensor:
        if self.spread is not None:
            weight = self.weight
            return search(z, weight, self.spread, self.reader(weight), self.voting.ranks, self.ops)
        if not self.by_candidates:
            return self.ops.nearest_codes(z, self.weight)
        buckets: dict[str, Any] = {"sign_bits": self.sign_bits, "num_probes": self.num_probes}
        candidates = self.ops.candidate_codes(z, num_codes=self.num_codes, **buckets)
        return self.ops.nearest_candidates(z, self.weight, candidates)

    def seen(self, z: Tensor) -> Tensor:
        """Return vectors as a step wants them: detached, and in whole sixteenths, int8, if ranks send them to each other."""
        return z.detach() if self.spread is None else queries(z.detach())

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the codes int64 [...], the straight-through vectors [..., C] in the dtype of z, and the two losses.

        Math:    c = table(code); straight through: c, with the gradient of z and none to the table
                 commitment: mean of (z - c)^2, c held; codebook: the same with z held. Both are float32 or better, []
        """
        ids = self.search(z)
        z = when_voting(z, self, self.seen(z), ids)
        c = self(ids)
        # z + (c - z) would round, and the next layer would see a vector that is no code.
        return ids, c.detach().to(z.dtype) + (z - z.detach()), commitment(z, c)

    def count_passes(self, passes: list[tuple[Tensor, ...]]) -> None:
        """Count the codes of some passes, then revive dead ones in the window of this step."""
        z_RC = torch.cat([z.reshape(-1, z.shape[-1]) for z, _ in passes])
        ids_R = torch.cat([ids.reshape(-1) for _, ids in passes])
        own_R = ids_R if self.spread is None else self.spread.places(ids_R)
        self.ops.count_codes(self.usage, own_R, out=self.usage)
        window = min(self.num_codes, ids_R.numel())
        # `step` counts passes, so that the windows of consecutive steps follow each other. No other place is kept.
        first = self.voting.step * window // len(passes)
        if self.spread is None:
            found = self.ops.revival_vectors(z_RC, self.weight, ids_R, self.usage, first=first, window=window)
        else:
            first, found = self._revival(z_RC, ids_R, int(first), window)
            z_RC = vectors(z_RC)
        sign_bits = self.sign_bits if self.by_candidates else 0
        self.ops.revive_codes(self.weight, z_RC, found, first=first, sign_bits=sign_bits, out=self.weight)
        self.ops.age_codes(self.usage, found, first=first, out=self.usage)
        self.changed()

    def _revival(self, z_RC: Tensor, ids_R: Tensor, first: int, window: int) -> tuple[int, Tensor]:
        """Return the first row of this rank in a window, by its place, and the vectors of its rows, as `revival_vectors` does."""
        assert self.spread is not None
        return revival(
            z_RC,
            self.weight,
            ids_R,
            self.get_buffer("usage"),
            first=first,
            window=window,
            spread=self.spread,
            read=self.reader(self.weight),
            ranks=self.voting.ranks,
            ops=self.ops,
        )


class MultimodalVQBridge(ArbModule):
    """The codebooks of all modalities behind one space of ids: text first, then image, then audio.

    Math:    global id = offset of the modality + code; an offset is the sum of the sizes of the tables before
    Shapes:  quantize [..., C] -> global ids int64 [...], [..., C]; rows: global ids [...] -> [..., C]
    Attributes:
        tables:    codebooks by modality, for the modalities that the config has codes for.
        offsets:   the first global id of each modality.
        num_codes: number of ids of all modalities, the vocabulary of the graph.
    Source:  docs/spec/codebook.md; REFACTOR11 (34,108 text codes and 24,576 others are 58,684)
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        sizes = {"text": config.num_codes, "image": config.image_codes, "audio": config.audio_codes}
        self.tables = PartDict()
        self.offsets: dict[str, int] = {}
        self.num_codes = 0
        for name, size in sizes.items():
            if size:
                self.tables[name] = TernaryVQCodebook(context, size, config.code_dim)
                self.offsets[name] = self.num_codes
                self.num_codes += size

    def quantize(self, z: Tensor, modality: str = "text") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the results of `TernaryVQCodebook.quantize` on the codes of one modality, with global ids."""
        checks.one_of("modality", modality, tuple(self.tables))
        ids, c, losses = self.codebooks[modality].quantize(z)
        return ids + self.offsets[modality], c, losses

    def rows(self, ids: Tensor) -> Tensor:
        """Return the codes of global ids, in the model's dtype. In a backward pass the named codes vote."""
        if len(self.tables) == 1:
            (only,) = self.codebooks.values()
            return only(ids)
        parts = []
        for name, table in self.codebooks.items():
            local = ids - self.offsets[name]
            inside = (local >= 0) & (local < table.num_codes)
            parts.append(table.rows_or_zeros(local, inside))
        return sum(parts[1:], parts[0])

    @property
    def codebooks(self) -> dict[str, TernaryVQCodebook]:
        """The codebooks by modality, in the order of their ids."""
        return {name: table for name, table in self.tables.items() if isinstance(table, TernaryVQCodebook)}


class SharedVQ(ArbModule):
    """The codebooks in the stream: a position becomes a code, and the code becomes a motif, which the layers see.

    A code names the position and the one NGRAM before it, which are six neighbouring bytes. A code of three bytes would say
    nothing that the stream does not hold, and text has fewer runs of three bytes than a large table has codes.

    Math:    d = W_down s; z_p = RMSNorm(d_p + turn(d_{p - 3})), where turn moves column c to (c + C // 2) mod C, and d is 0
             before the first position of a modality; code = nearest of the modality; c = table(code), straight through;
             u = RMSNorm(W_up c). The output is s + u / 4 with `motif_residual`, else u. Each loss is the mean over the
             modalities of the batch
    Shapes:  by modality [B, P_m, D], one after the other -> [B, P, D], global ids int64 [B, P], losses [] by name
    Ledger:  holds the d of text positions, so that a later pass finds the codes that one pass over all bytes finds
    Source:  REFACTOR14 (SharedVQ, motifs of width 64); docs/spec/codebook.md
    """

    def __init__(self, context: GraphContext) -> None:
        super().__init__(context)
        config = context.config
        self.motif_residual = config.motif_residual
        self.down = TernaryLinear(context, config.width, config.code_dim)
        self.down_norm = TernaryRMSNorm(context, config.code_dim)
        self.bridge = MultimodalVQBridge(context)
        self.up = TernaryLinear(context, config.code_dim, config.width)
        exponent = MOTIF_EXPONENT if config.motif_residual else 0
        self.up_norm = TernaryRMSNorm(context, config.width, exponent=exponent)

    def forward(
        self, parts: Mapping[str, Tensor], ledger: KVLedger | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the stream after the codebooks, the code of each position, and the losses of the codebooks.

        Both matrices read the positions of all modalities at once, so that they vote once. With a ledger, text positions follow
        the positions that it holds.
        """
        s_BPD = torch.cat(list(parts.values()), dim=1)
        d_BPC = self.down(s_BPD)
        z_BPC = self.down_norm(
            d_BPC + self._earlier(d_BPC, parts, ledger).roll(d_BPC.shape[-1] // 2, dims=-1)
        )
        codes, vectors = [], []
        losses: dict[str, Tensor] = {}
        for z_of_part, modality in zip(
            z_BPC.split([s.shape[1] for s in parts.values()], dim=1), parts, strict=True
        ):
            codes_of_part, c_of_part, of_part = self.bridge.quantize(z_of_part, modality)
            codes.append(codes_of_part)
            vectors.append(c_of_part)
            for name, value in of_part.items():
                share = value / len(parts)
                losses[name] = losses[name] + share if name in losses else share
        u_BPD = self.up_norm(self.up(torch.cat(vectors, dim=1)))
        return (u_BPD + s_BPD if self.motif_residual else u_BPD), torch.cat(codes, dim=1), losses

    def _earlier(self, d_BPC: Tensor, parts: Mapping[str, Tensor], ledger: KVLedger | None) -> Tensor:
        """Return the row of d NGRAM positions before each position in its modality, [B, P, C]; 0 where there is none."""
        earlier, kept = [], []
        for d_of_part, modality in zip(
            d_BPC.split([s.shape[1] for s in parts.values()], dim=1), parts, strict=True
        ):
            before = d_of_part.new_zeros(d_of_part.shape[0], NGRAM, d_of_part.shape[2])
            if ledger is not None and modality == "text":
                before = ledger.previous_vectors(NGRAM)
            earlier.append(torch.cat([before, d_of_part], dim=1)[:, : d_of_part.shape[1]])
            # Text does not read media, so the ledger holds zeros for them.
            kept.append(d_of_part if modality == "text" else torch.zeros_like(d_of_part))
        if ledger is not None:
            ledger.record_vectors(torch.cat(kept, dim=1))
        return torch.cat(earlier, dim=1)

    @property
    def num_codes(self) -> int:
        """Number of ids of all modalities."""
        return self.bridge.num_codes

    def rows(self, ids: Tensor) -> Tensor:
        """Return the codes of global ids, as `MultimodalVQBridge.rows` does."""
        return self.bridge.rows(ids)


def commitment(z: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Return the mean squared distances that pull vectors to their codes and codes to their vectors, by name of the loss."""
    wide = wide_dtype(z)
    z, c = z.to(wide), c.to(wide)
    return {
        "commitment": (z - c.detach()).square().mean(),
        "codebook": (c - z.detach()).square().mean(),
    }
