"""The samples of a micro-batch of a mix, as a model reads them and is taught by them.

Legend: B samples of a batch, T ids, N vectors or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from arbitor.optimized.distributed.world import World
from arbitor.optimized.training.generate import first_window
from arbitor.optimized.training.media import CAPTION_END, Features, lead_of
from arbitor.optimized.training.media_files import Item
from arbitor.reference.config import NGRAM, SPECIAL_IDS
from arbitor.reference.graph import Targets
from arbitor.reference.graph.talker import spoken_marks
from arbitor.reference.graph.targets import NO_TOKEN


@dataclass(frozen=True)
class Batch:
    """The samples of a micro-batch, all of one kind, on the CPU.

    Attributes:
        kind: one of KINDS.
        ids_BT: int64 [B, T]. Texts of samples of media have PAD behind them, where no position of the text sees it.
        media: features before the ids, by their names in `ArbModel.trunk`.
        targets: what the heads are taught; None: every byte.
        items: the files of the samples of all ranks; none of text.
    """

    kind: str
    ids_BT: Tensor
    media: Features = field(default_factory=dict)
    targets: Targets | None = None
    items: tuple[Item, ...] = ()

    def taught_bytes(self) -> int:
        """Return the number of bytes that are predicted."""
        mask = None if self.targets is None else self.targets.taught_BT
        return self.ids_BT[:, NGRAM:].numel() if mask is None else int(mask[:, NGRAM:].sum())

    def terms(self) -> dict[str, int]:
        """Return of how many terms each component of the loss is a mean, by name: of bytes, samples or tokens."""
        samples, tokens = len(self.ids_BT), None if self.targets is None else self.targets.tokens_BN
        num_tokens = 0 if tokens is None else int((tokens != NO_TOKEN).sum())
        return {"bytes": self.taught_bytes(), "route": samples, "latent": samples, "tokens": num_tokens}

    def share(self, world: World) -> Batch:
        """Return the samples of this rank, as `World.share` shares windows. The batches of all ranks have one shape."""
        return self._taken(world.share)

    def parts(self, count: int) -> list[Batch]:
        """Return the samples in parts: an equal part for each of `count` ranks, then each sample that is left over by itself.

        Where the number of samples is a multiple of `count`, part r is the `share` of rank r. Samples stay as long as in the batch.
        """
        size, left = divmod(len(self.ids_BT), count)
        ends = [size * number for number in range(count + 1)] if size else [0]
        ends += [ends[-1] + number for number in range(1, left + 1)]
        return [self._taken(itemgetter(slice(*each))) for each in pairwise(ends)]

    def _taken(self, take: Callable[[Tensor], Tensor]) -> Batch:
        """Return some of the samples, which `take` takes of each tensor."""
        targets = self.targets
        if targets is not None:
            taken = {name: None if value is None else take(value) for name, value in vars(targets).items()}
            targets = Targets(**taken)
        media = {name: take(value) for name, value in self.media.items()}
        return replace(self, ids_BT=take(self.ids_BT), media=media, targets=targets)

    def on(self, device: torch.device | str) -> dict[str, Any]:
        """Return the arguments of `ArbModel.losses` on a device."""
        media = {name: value.to(device) for name, value in self.media.items()}
        arguments: dict[str, Any] = {"ids_BT": self.ids_BT.to(device), **media}
        if self.targets is not None:
            moved = {
                name: None if value is None else value.to(device)
                for name, value in vars(self.targets).items()
            }
            arguments["targets"] = Targets(**moved)
        return arguments


def captioned(
    kind: str,
    texts: Sequence[bytes],
    *,
    context: int,
    modality_B: Tensor | None,
    media: Features | None = None,
    latent: Tensor | None = None,
    tokens_BN: Tensor | None = None,
) -> Batch:
    """Return a batch of texts after media, or of texts that a latent or tokens answer.

    Args:
        kind: of the samples.
        texts: one of each sample; what has no room is cut off.
        context: ids of a sample at most, before the marks at which a talker answers.
        modality_B: what the router learns, as in `Targets`, or None.
        media: features before the texts, or None.
        latent, tokens_BN: what answers the texts, as in `Targets`.
    """
    end = CAPTION_END if media else b""
    marks = [] if tokens_BN is None else spoken_marks(tokens_BN.shape[1])
    if media:
        lead = lead_of(media)
        leads_B1 = torch.full((len(texts), 1), len(lead))
        rows = [[*lead, *(text + end)[: context - len(lead)]] for text in texts]
    else:
        # As a prompt is read. Marks before it would tell the router that no text is asked for.
        rows = [first_window(text[:context]) for text in texts]
        leads_B1 = torch.tensor([[max(0, NGRAM - len(text))] for text in texts])
    # A model reads a byte more than the three before the first that it predicts.
    longest = max(NGRAM + 1, max(len(row) for row in rows) + len(marks))
    pad = SPECIAL_IDS["PAD"]
    # Filling before a text would tell how long the text is.
    ids_BT = torch.tensor([row + marks + [pad] * (longest - len(row) - len(marks)) for row in rows])
    place_T, ends_B1 = torch.arange(longest), torch.tensor([[len(row)] for row in rows])
    taught_BT = (place_T >= leads_B1) & (place_T < ends_B1)
    # The first id behind a text is no mark.
    spoken_BT = (place_T > ends_B1) & (place_T < ends_B1 + len(marks)) if marks else None
    targets = Targets(modality_B, latent, tokens_BN, taught_BT=taught_BT, spoken_BT=spoken_BT)
    return Batch(kind, ids_BT, media or {}, targets)
