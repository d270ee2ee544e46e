"""The first lines of a run: whether it goes on, and what is trained, on what bytes, how long and where."""

from __future__ import annotations

from arbitor.optimized.training.plan import preset_in_words
from arbitor.optimized.training.prepared import Prepared
from arbitor.optimized.training.shown import shown
from arbitor.reference.audit import audit


def first_lines(prepared: Prepared) -> list[str]:
    """Return the sentences that a run begins with."""
    settings, mix = prepared.settings, prepared.mix
    windows = settings.batch * settings.accum
    total = settings.steps * windows * settings.context
    threads = prepared.document["threads"]
    config = prepared.model.config
    return [
        *_of_going_on(prepared),
        f"model: {shown(preset_in_words(settings.as_json(), config.name))}, {audit(config).weights:,} ternary weights",
        *([] if prepared.beginning is None else prepared.beginning.first_lines()),
        *([] if prepared.adaptation is None else [prepared.adaptation.description()]),
        *prepared.text.first_lines(),
        *([] if mix is None else mix.first_lines()),
        *([] if prepared.batch_size is None else [prepared.batch_size.reason]),
        f"steps: {settings.steps:,} of {windows:,} windows of {settings.context:,} bytes: {total:,} bytes, "
        f"{total / prepared.text.split.train.num_bytes():,.2f} times what is there to learn from",
        f"device: {settings.device}, {settings.backend}, {settings.dtype}, {threads} CPU thread{'' if threads == 1 else 's'}",
        *_of_ranks(prepared),
    ]


def _of_going_on(prepared: Prepared) -> list[str]:
    """Return where a run goes on, and what is different from here on; nothing for a new run."""
    found, steps, lines = prepared.found, prepared.settings.steps, []
    if found.checkpoint is not None and prepared.is_longer():
        lines.append(
            f"going on at step {found.checkpoint.step:,} of {found.checkpoint.run['steps']:,} with {steps:,} steps in all: from "
            f"here on the rate is that of a run of {steps:,}"
        )
    elif found.note:
        lines.append(found.note)
    before = (found.settings or prepared.document).get("ranks", 1)
    if before != prepared.world.count:
        lines.append(
            f"the run had {_ranks(before)} and goes on with {_ranks(prepared.world.count)}: from here on gradients are summed "
            "in another order, so its state is not that of a run that keeps its ranks"
        )
    return lines


def _of_ranks(prepared: Prepared) -> list[str]:
    """Return how the windows are shared; nothing for a process that is alone."""
    count, batch = prepared.world.count, prepared.settings.batch
    if count == 1:
        return []
    return [f"{_ranks(count)}: each reads {batch // count:,} windows of a micro-batch"]


def _ranks(count: int) -> str:
    """Return a number of ranks in words."""
    return f"{count} rank{'' if count == 1 else 's'}"
