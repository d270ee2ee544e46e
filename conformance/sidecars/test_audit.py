"""What sidecars weigh at their full size: the seed documents' figures, and what is really stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arbitor.optimized import cli
from arbitor.sidecars import SidecarAudit, VisionSidecar, audit_of, standard_audit
from arbitor.sidecars.audit import COUNTED_BY_THE_SEEDS, SEED_MIB, STANDARD
from arbitor.sidecars.precision import frozen

MIB = 2**20


@pytest.fixture(scope="module")
def audits() -> dict[str, SidecarAudit]:
    return {audit.name: audit for audit in standard_audit()}


@pytest.mark.parametrize(
    ("name", "modules", "weights", "stored_mib"),
    [
        ("DINOv2-small", {"QConv2d": 1, "QLinear": 72}, 22_056_576, 22.90),
        ("Moonshine-base", {"QLinear": 128}, 61_513_920, 108.24),
        ("Wan 2.1 VAE (pig-vae)", {"QConv2d": 10, "QCausalConv3d": 61}, 126_892_531, 121.20),
    ],
)
def test_full_size(
    audits: dict[str, SidecarAudit], name: str, modules: dict[str, int], weights: int, stored_mib: float
) -> None:
    audit = audits[name]
    assert audit.modules == modules and audit.weights == weights and audit.trainable == 0
    assert round(audit.stored_bytes / MIB, 2) == stored_mib
    assert audit.stored_bytes == sum(audit.by_dtype.values()) and not audit.bfloat16


def test_how_the_seeds_counted(audits: dict[str, SidecarAudit]) -> None:
    """A quantised weight reports float32, so that 131.14 MiB of int8 and scales were taken for 318.80."""
    parts = [audits[name] for name in COUNTED_BY_THE_SEEDS]
    assert round(sum(part.counted_bytes for part in parts) / MIB, 2) == SEED_MIB
    assert round(sum(part.stored_bytes for part in parts) / MIB, 2) == 131.14


def test_a_loaded_sidecar_is_counted_like_one_without_weights(checkpoints: Path) -> None:
    import transformers

    sidecar = VisionSidecar.load(checkpoints / "dinov2")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(checkpoints / "dinov2")
        empty, _ = frozen(transformers.Dinov2Model(config), "int8")
    assert audit_of("a", sidecar.network) == audit_of("a", empty)


def test_stored_bytes_are_those_of_the_tensors(checkpoints: Path) -> None:
    """By the bytes of a state dict: values, scales and whatever stays float."""
    network = VisionSidecar.load(checkpoints / "dinov2").network
    tensors = {
        k: v for k, v in network.state_dict().items() if not k.endswith(("input_scale", "output_scale"))
    }
    scales = sum(b.numel() * b.element_size() for b in network.buffers())
    want = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + scales
    assert audit_of("a", network).stored_bytes == want


def test_every_standard_sidecar_is_audited(audits: dict[str, SidecarAudit]) -> None:
    assert set(audits) == set(STANDARD)


def test_the_command_shows_both_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`arb audit --sidecars`: modules, weights, stored bytes, and the figure of REFACTOR11 with the difference 0."""
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", "--preset", "r11", "--sidecars"])
    assert not ended.value.code
    text = capsys.readouterr().out
    for shown in (
        "1 QConv2d, 72 QLinear",
        "128 QLinear",
        "61 QCausalConv3d, 10 QConv2d",
        "108.24",
        "234.66",
        "126,892,531",
    ):
        assert shown in text, shown
    figure = next(line for line in text.splitlines() if "sidecars MiB" in line)
    assert figure.count("318.8") == 2 and "+0.0" in figure and "(!)" not in figure
    with pytest.raises(SystemExit):
        cli.main(["audit", "--preset", "tiny", "--sidecars", "--json"])
    parts = json.loads(capsys.readouterr().out)["sidecars"]
    assert [part["weights"] for part in parts] == [22_056_576, 61_513_920, 126_892_531]
