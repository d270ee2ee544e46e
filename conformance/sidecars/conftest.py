"""Small random checkpoints, saved by the real libraries, and real ones where a cache holds them."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance.sidecars.media_runs import register, render
from conformance.training.nano import without_pictures

LIBRARIES = ("transformers", "diffusers", "optimum.quanto", "PIL", "av")
"""What these tests need."""

REAL = {"vision": "facebook/dinov2-small", "audio": "UsefulSensors/moonshine-base"}
"""Repositories of real checkpoints."""

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave these tests out where a library is missing, and say which. A file that needs fewer names them in `LIBRARIES`."""
    missing = {}
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing[name] = f"{name} ({error})"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            needed = getattr(getattr(item, "module", None), "LIBRARIES", LIBRARIES)
            lacking = [missing[name] for name in needed if name in missing]
            if lacking:
                reason = f"sidecars need {', '.join(lacking)}: pip install 'arbitor[sidecars,media]'"
                item.add_marker(pytest.mark.skip(reason=reason))


def original_key(name: str) -> str:
    """Return the name that the checkpoint of Wan 2.1 gives to a tensor of `AutoencoderKLWan`."""
    name = re.sub(r"^quant_conv\.", "conv1.", name)
    name = re.sub(r"^post_quant_conv\.", "conv2.", name)
    for ours, theirs in (
        ("coder.conv_in.", "coder.conv1."),
        ("coder.norm_out.", "coder.head.0."),
        ("coder.conv_out.", "coder.head.2."),
        ("coder.mid_block.resnets.0.", "coder.middle.0."),
        ("coder.mid_block.attentions.0.", "coder.middle.1."),
        ("coder.mid_block.resnets.1.", "coder.middle.2."),
        ("encoder.down_blocks.", "encoder.downsamples."),
    ):
        name = name.replace(ours, theirs)
    block = r"^decoder\.up_blocks\.(\d)\."
    name = re.sub(
        block + r"resnets\.(\d)\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}.", name
    )
    name = re.sub(block + r"upsamplers\.0\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}.", name)
    in_block = re.fullmatch(
        r"(.*\.(?:middle\.[02]|downsamples\.\d+|upsamples\.\d+)\.)(\w+)\.(gamma|weight|bias)", name
    )
    if in_block and in_block[2] in _RESIDUAL:
        return f"{in_block[1]}{_RESIDUAL[in_block[2]]}.{in_block[3]}"
    return name


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `dinov2/`, `moonshine/`, `vae/config.json` and `vae/pig_vae.safetensors`, small and random."""
    import transformers
    from diffusers import AutoencoderKLWan
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("sidecars")
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_attention_heads": 2}
    vision = transformers.Dinov2Config(**small, num_hidden_layers=2, image_size=518)
    transformers.Dinov2Model(vision).save_pretrained(folder / "dinov2")
    parts = {f"{part}_num_hidden_layers": 2 for part in ("encoder", "decoder")}
    heads = {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder")}
    sound = transformers.MoonshineConfig(
        hidden_size=48, intermediate_size=96, vocab_size=64, **parts, **heads
    )
    transformers.MoonshineForConditionalGeneration(sound).save_pretrained(folder / "moonshine")
    vae = AutoencoderKLWan(base_dim=4)
    vae.save_config(folder / "vae")
    tensors = {original_key(name): tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "vae" / "pig_vae.safetensors")
    return folder


@pytest.fixture(scope="session")
def real_checkpoint() -> object:
    """Return a function from `vision` or `audio` to the folder of a real checkpoint; it skips and says where it looked."""

    def find(kind: str) -> Path:
        from huggingface_hub import constants, snapshot_download

        try:
            return Path(snapshot_download(REAL[kind], local_files_only=True))
        except Exception:
            where = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
            pytest.skip(f"no {REAL[kind]} in the cache of the hub, HF_HUB_CACHE ({where})")

    return find


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test take short runs on one thread, without pictures at their end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    without_pictures(monkeypatch)
    register(monkeypatch)
    monkeypatch.delenv("ARB_BACKEND", raising=False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """Return a folder with rendered media of every kind."""
    return render(tmp_path_factory.mktemp("media") / "data", checkpoints)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of features that the tests of a file share."""
    return str(tmp_path_factory.mktemp("features"))
