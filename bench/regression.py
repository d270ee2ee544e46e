"""Regressions: what of our code is slower than the stored results of the same device, past margins that noise stays within.

A case has become slower if the fast fifth of its rounds takes longer than the slow fifth of the stored rounds allows:

    p20 now > margin * p80 stored + SLACK_US

The margins are chosen from the stored results of two kinds of GPU. Cases of peers and of the reference were measured there in
several runs, and are mostly the same code in each, so they show how far a time moves by itself: between machines, hosts and days.
Of 422 pairs of results in a graph, in both orders, none moved by a factor of more than 1.074 beyond the slack. Of 1,046 pairs with
the launch, whole train steps aside, none moved by more than 1.84: a host takes its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A result, as `bench.runner` makes it."""

MARGINS = {"graph": 1.10, "eager": 2.0}
"""Factor that a time may grow by: of the device alone, and with the launch."""

SLACK_US = 2.0
"""Microseconds that any time may grow by besides: the graph of an empty kernel took 3.2 to 5.9 of them, from run to run."""

DEVICE_BOUND_US = 10_000.0
"""A recorded train step that took so long is the device's work, though the host looks at its loss: it has the margin of a graph."""

TRIES = 3
"""How often a case is timed before it is called slower."""

NOT_ON_A_CPU = (
    "No results of CPUs are kept here: between three runs within two minutes on one CPU, ratios to torch moved by a factor of up "
    "to 2.5, so that any margin for them would miss what it is for. Your own are compared once you save some"
)
"""Why a CPU has nothing to be compared with."""

NAMES = {"graph": "in a graph", "eager": "with its launch"}


@dataclass(frozen=True)
class Stored:
    """A stored result, and the file that has it."""

    row: Row
    file: str


class Baseline:
    """The stored results of a device by the id of their case, the newest of each.

    Args:
        compared: benchmarks by name by file, oldest file first, as pytest-benchmark loads them.
    """

    def __init__(self, compared: Mapping[Any, Mapping[str, Mapping[str, Any]]]) -> None:
        self.results: dict[str, Stored] = {}
        for path, benchmarks in compared.items():
            for case, bench in benchmarks.items():
                if bench["extra_info"]:
                    self.results[case] = Stored(bench["extra_info"], str(path))

    def of(self, case: str, row: Row) -> Stored | None:
        """Return the stored result of a case, or None if there is none at the sizes of the row."""
        found = self.results.get(case)
        return found if found is not None and found.row.get("sizes") == row.get("sizes") else None

    def why_slower(self, case: str, row: Row, again: Callable[[str], Mapping[str, float]]) -> str | None:
        """Return one sentence that says in what a case is slower than stored, or None if it is not.

        Args:
            case:  its id.
            row:   its result.
            again: times the case again in the mode that is named, and returns p20, p50 and p80. A disturbance does not come
                   back; only what is slower in each of TRIES tries is called slower.
        """
        stored = self.of(case, row)
        if stored is None:
            return None
        if stored.row.get("graph") and not row.get("graph"):
            return f"{case} was recorded in a CUDA graph in {stored.file}, and cannot be now: {row.get('no_graph')}"
        for mode in MARGINS:
            then = stored.row.get(mode)
            if not then or not row.get(mode):
                continue
            margin = margin_of(row, then, mode)
            allowed = margin * then["p80_us"] + SLACK_US
            fastest, tries = row[mode]["p20_us"], 1
            while fastest > allowed and tries < TRIES:
                fastest, tries = min(fastest, again(mode)["p20_us"]), tries + 1
            if fastest > allowed:
                return (
                    f"{case} is slower than in {stored.file}: {NAMES[mode]} it took {then['p50_us']:.5g} us, and now p20 is "
                    f"{fastest:.5g} us in the best of {tries} tries, where {allowed:.5g} us are allowed "
                    f"({margin:g} times the stored p80, and {SLACK_US:g} us)"
                )
        return None


def margin_of(row: Row, then: Mapping[str, float], mode: str) -> float:
    """Return the factor that the time of a case may grow by in a mode; `then` are its stored times."""
    recorded = row.get("recorded_passes") and then["p50_us"] >= DEVICE_BOUND_US
    return MARGINS["graph" if recorded else mode]
