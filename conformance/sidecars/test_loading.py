"""Sidecars are loaded by their own libraries, all of them or not at all, in int8, frozen."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arbitor.sidecars import (
    AudioSidecar,
    Sidecar,
    SidecarError,
    VideoSidecar,
    VisionSidecar,
    libraries,
    precision,
)
from conformance.compare import exact
from conformance.sidecars.small_checkpoints import original_key

LOADERS: dict[str, Callable[..., Sidecar]] = {
    "vision": lambda folder, **options: VisionSidecar.load(folder / "dinov2", **options),
    "audio": lambda folder, **options: AudioSidecar.load(folder / "moonshine", **options),
    "video": lambda folder, **options: VideoSidecar.load(
        folder / "vae" / "pig_vae.safetensors", config=folder / "vae", **options
    ),
}
KINDS = tuple(LOADERS)


def files_of(kind: str, folder: Path) -> Path:
    """Return the safetensors of a checkpoint."""
    names = {"vision": "dinov2/model", "audio": "moonshine/model", "video": "vae/pig_vae"}
    return folder / f"{names[kind]}.safetensors"


def output(sidecar: Any) -> Tensor:
    """Return what a sidecar makes of some fixed input."""
    rng = torch.Generator().manual_seed(1)
    if isinstance(sidecar, VisionSidecar):
        return sidecar([torch.randint(0, 256, (3, 240, 300), dtype=torch.uint8, generator=rng)])
    if isinstance(sidecar, AudioSidecar):
        return sidecar([torch.rand(16_000, generator=rng) - 0.5])[0]
    return sidecar.encode(torch.randint(0, 256, (1, 5, 3, 32, 32), dtype=torch.uint8, generator=rng))


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_twice_gives_the_same_bits(checkpoints: Path, kind: str) -> None:
    one, other = (LOADERS[kind](checkpoints) for _ in range(2))
    exact(output(one), output(other))
    assert one.identity == other.identity


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near_what_float_gives(checkpoints: Path, kind: str) -> None:
    """Rounding weights to 8 bits moves outputs by a few percent, and by more than nothing."""
    got, kept = output(LOADERS[kind](checkpoints)), output(LOADERS[kind](checkpoints, precision="bfloat16"))
    error = float((got - kept).norm() / kept.norm())
    assert 0 < error < 0.08, error


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_train(checkpoints: Path, kind: str) -> None:
    sidecar = LOADERS[kind](checkpoints)
    assert not any(parameter.requires_grad for parameter in sidecar.network.parameters())
    assert not output(sidecar).requires_grad
    assert sidecar.requires_grad_(False) is sidecar
    with pytest.raises(RuntimeError, match="frozen"):
        sidecar.requires_grad_(True)


@pytest.mark.parametrize("kind", KINDS)
def test_is_no_part_of_the_model_that_owns_it(checkpoints: Path, kind: str) -> None:
    owner = nn.Sequential(LOADERS[kind](checkpoints))
    assert not owner.state_dict() and not list(owner.parameters()) and not list(owner.buffers())
    owner.train()
    assert not any(module.training for module in owner[0].network.modules())
    assert copy.deepcopy(owner)[0] is owner[0]
    with pytest.raises(RuntimeError, match="load it again"):
        pickle.dumps(owner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_keeps_its_precision(checkpoints: Path, kind: str, change: str) -> None:
    sidecar = LOADERS[kind](checkpoints)
    before = output(sidecar)
    with pytest.raises(TypeError, match="int8"):
        getattr(sidecar, change)()
    exact(output(sidecar.to("cpu").float()), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact(output(sidecar), before)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_extra_and_other_weights_are_named(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(checkpoints, folder)
    path = files_of(kind, folder)
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2 or kind == "video")

    def refused(changed: dict[str, Tensor], match: str) -> None:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(SidecarError, match=match):
            LOADERS[kind](folder)

    less = {key: value for key, value in tensors.items() if key != name}
    refused(less, r"lacks|loads" if kind == "video" else f"lacks .*{name.removeprefix('model.')}")
    # An untouched prefix, so that the library takes the name for one of its own.
    extra = f"{name}.surplus"
    refused({**tensors, extra: torch.ones(3)}, "surplus")
    refused({**tensors, name: torch.zeros(7, 5)}, "shape|loads|lacks")


def test_a_video_file_that_lacks_a_tensor_says_which(checkpoints: Path, tmp_path: Path) -> None:
    """The library gives such a tensor random values, and says so in a log at most."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(files_of("video", checkpoints))
    del tensors[original_key("decoder.conv_in.weight")]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(SidecarError, match=r"lacks decoder\.conv_in\.weight"):
        VideoSidecar.load(tmp_path / "short.safetensors", config=checkpoints / "vae")


def test_a_video_tensor_of_other_values_is_seen() -> None:
    """Names alone do not show that the library took a tensor: its values must have arrived."""
    from arbitor.sidecars.source import refuse_other_tensors

    one, other = {"a": torch.ones(2), "b": torch.zeros(2)}, {"x": torch.ones(2), "y": torch.full((2,), 3.0)}
    refuse_other_tensors("f", one, {"x": torch.zeros(2), "y": torch.ones(2)})
    with pytest.raises(SidecarError, match="lacks y; it has beside the network's b"):
        refuse_other_tensors("f", one, other)


def test_the_194_original_keys() -> None:
    """REFACTOR11: loading pig-vae's file as a state dict gives 194 missing and 194 unexpected keys."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan()
        names = {original_key(name): tensor for name, tensor in vae.state_dict().items()}
        report = vae.load_state_dict(names, strict=False)
    assert len(names) == len(report.missing_keys) == len(report.unexpected_keys) == 194


@pytest.mark.parametrize(("kind", "wrong"), [("vision", "moonshine"), ("audio", "dinov2")])
def test_another_architecture_is_refused(checkpoints: Path, kind: str, wrong: str) -> None:
    cls = {"vision": VisionSidecar, "audio": AudioSidecar}[kind]
    with pytest.raises(SidecarError, match=f"'{wrong}'"):
        cls.load(checkpoints / wrong)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("no such folder", "must be a folder that exists"),
        ("../nowhere/at/all", "must be a folder that exists"),
    ],
)
def test_a_source_that_is_not_there(source: str, match: str) -> None:
    with pytest.raises(SidecarError, match=match):
        VisionSidecar.load(source)


def test_only_safetensors_are_read(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoints / "dinov2", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SidecarError, match=r"no \*\.safetensors"):
        VisionSidecar.load(folder)
    with pytest.raises(SidecarError, match=r"\.safetensors"):
        VideoSidecar.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(SidecarError, match=r"no config\.json"):
        VisionSidecar.load(folder)


def test_a_damaged_file_is_a_sentence(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints / "moonshine", folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SidecarError, match="loads") as caught:
        AudioSidecar.load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "it is no JSON"),
        ("config.json", b"[]", "it is no object"),
        ("config.json", b"\xff\xfe", "it is no JSON"),
        ("preprocessor_config.json", b"[1]", "it is no object"),
    ],
)
def test_damaged_settings_are_a_sentence(
    checkpoints: Path, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints / "dinov2", folder)
    (folder / name).write_bytes(content)
    with pytest.raises(SidecarError, match=rf"the settings in '.*{name}' cannot be read: {says}"):
        VisionSidecar.load(folder)


def test_code_that_a_folder_brings_along_is_not_asked_about(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would ask on a terminal whether to run it."""
    folder = tmp_path / "brings"
    shutil.copytree(checkpoints / "dinov2", folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "evil.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("it was asked"))
    (folder / "config.json").write_text(json.dumps({**config, **code, "model_type": "evil"}))
    with pytest.raises(SidecarError, match="holds a 'evil', but must hold a 'dinov2'"):
        VisionSidecar.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    assert VisionSidecar.load(folder).num_features == 48


def test_identity_follows_the_files_and_the_precision(checkpoints: Path, tmp_path: Path) -> None:
    """Features of other weights, of another precision or of other preparation are never taken from a cache."""
    folder = tmp_path / "other"
    shutil.copytree(checkpoints / "dinov2", folder)
    seen = {VisionSidecar.load(folder).identity, VisionSidecar.load(folder, precision="bfloat16").identity}
    settings = {"size": {"shortest_edge": 300}, "crop_size": {"height": 280, "width": 280}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    seen.add(VisionSidecar.load(folder).identity)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    seen.add(VisionSidecar.load(folder).identity)
    assert len(seen) == 4


def test_without_quanto_bfloat16_and_one_warning(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_quanto", lambda: False)
    with pytest.warns(UserWarning, match="not strict") as caught:
        sidecar = LOADERS["vision"](checkpoints)
    assert len([w for w in caught if "quanto" in str(w.message)]) == 1
    assert sidecar.precision == "bfloat16" and output(sidecar).dtype is torch.float32
    assert all(p.dtype is torch.bfloat16 for p in sidecar.network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LOADERS["vision"](checkpoints, precision="bfloat16")


def test_precisions_are_two(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'int4'"):
        LOADERS["audio"](checkpoints, precision="int4")


@pytest.mark.parametrize("name", sorted(libraries.EXTRA_OF))
def test_a_missing_library_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(wanted: str) -> Any:
        raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted.partition(".")[0])

    monkeypatch.setattr(libraries.importlib, "import_module", absent)
    with pytest.raises(SidecarError, match=rf"pip install 'arbitor\[{libraries.EXTRA_OF[name]}\]'"):
        libraries.library(name)


@pytest.mark.parametrize(("kind", "features"), [("vision", 384), ("audio", 416)])
def test_real_checkpoints(real_checkpoint: Callable[[str], Path], kind: str, features: int) -> None:
    cls = {"vision": VisionSidecar, "audio": AudioSidecar}[kind]
    sidecar = cls.load(real_checkpoint(kind))
    assert output(sidecar).shape[-1] == features
