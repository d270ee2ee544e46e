"""`arb smoke` from the command line."""

from __future__ import annotations

import pytest

from arbitor.reference.audit import audit
from arbitor.reference.graph import ArbModel
from conformance.system.command import Here, check_refused
from conformance.system.nano_arb import make_loss_nan
from conformance.training.nano import NANO


def test_smoke_reports_what_refactor_12_reports(here: Here) -> None:
    result = here("smoke", "--preset", "nano", "--device", "cpu", "--ctx", "5", "--batch", "2", "--backward")
    assert result.returncode == 0, result.stderr.decode()
    lines = dict(line.split(": ", 1) for line in result.stdout.decode().splitlines()[1:])
    passes = [f"{part}, {when}" for when in ("cold", "warm") for part in ("forward", "backward/update")]
    assert list(lines) == ["logical ternary weights", "training state", "loss", "build", *passes]
    assert lines["logical ternary weights"] == f"{audit(NANO).weights:,}"
    assert lines["training state"].endswith(" MiB") and lines["forward, cold"].endswith(" s")
    assert "backward" not in here("smoke", "--preset", "nano", "--device", "cpu").stdout.decode()


def test_smoke_of_a_loss_that_is_not_finite(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that it is put back.
    monkeypatch.setattr(ArbModel, "losses", ArbModel.losses)
    make_loss_nan(0)
    check_refused(here("smoke", "--preset", "nano", "--device", "cpu", "--backward"), 1, "not finite")
