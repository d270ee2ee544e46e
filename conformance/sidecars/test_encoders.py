"""The model owns its encoders: raw media go in, and give what features made by hand give."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor import ArbModel
from arbitor.optimized.training.media import lead_of
from arbitor.sidecars import Encoders, FeatureCache, SidecarError, VisionSidecar
from arbitor.sidecars.encoders import FRAMES_READ, first_frame, spread_frames, whole_seconds
from conformance.compare import exact
from conformance.graph.models import WHOLE, random_ids

CONFIG = replace(WHOLE, image_features=48, audio_features=48)
"""A model as wide as the small random sidecars."""


def picture(seed: int, height: int = 40, width: int = 56) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)


def sound(seed: int, samples: int = 9000) -> Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(seed)) - 0.5


def clip(seed: int, frames: int = 6) -> Tensor:
    return torch.stack([picture(seed + number) for number in range(frames)])


@pytest.fixture(scope="module")
def encoders(checkpoints: Path) -> Encoders:
    vae = checkpoints / "vae"
    return Encoders(
        vision=checkpoints / "dinov2",
        audio=checkpoints / "moonshine",
        video=vae / "pig_vae.safetensors",
        video_config=vae,
    )


@pytest.fixture
def model(encoders: Encoders) -> ArbModel:
    return ArbModel(CONFIG, device="cpu", ops="reference").use_encoders(encoders)


def test_raw_media_are_their_features(model: ArbModel, encoders: Encoders) -> None:
    ids_BT, vision, audio = random_ids(2, 9), encoders.sidecar("vision"), encoders.sidecar("audio")
    images, sounds, clips = (
        [picture(0), picture(1, 64, 30)],
        [sound(0), sound(1, 20_000)],
        [clip(0), clip(7, 1)],
    )
    image_BNF = vision(images)
    audio_BNF = torch.stack(audio([torch.cat([s, torch.zeros(32_000 - len(s))]) for s in sounds]))
    frames_BNF = torch.stack(
        [torch.cat(list(vision(clips[0][[0, 1, 3, 5]]))), torch.cat(list(vision([clips[1][0]] * 4)))]
    )
    for raw, features in (
        ({"images": images}, {"image_BNF": image_BNF}),
        ({"sounds": sounds}, {"audio_BNF": audio_BNF}),
        ({"clips": clips, "sounds": sounds}, {"image_BNF": frames_BNF, "audio_BNF": audio_BNF}),
    ):
        with torch.no_grad():
            got: dict[str, Any] = {"logits": model(ids_BT, **raw), **model.losses(ids_BT, **raw)}
            want = {"logits": model(ids_BT, **features), **model.losses(ids_BT, **features)}
            exact(model.loss(ids_BT, **raw), want["bytes"])
        for name, value in want.items():
            exact(got[name], value, name)
    exact(
        model.respond(ids_BT, images=images).modality_B, model.respond(ids_BT, image_BNF=image_BNF).modality_B
    )


def test_latents_come_from_the_first_frame(encoders: Encoders) -> None:
    """REFACTOR11's shapes, at the side that a head asks for, and back to frames."""
    clips = [clip(0), clip(3)]
    latents = encoders.latents(clips, side=4)
    assert latents.shape == (2, 16, 1, 4, 4)
    exact(latents, encoders.sidecar("video").encode(torch.stack([first_frame(c, 32) for c in clips])))
    exact(latents, encoders.latents([c[:1] for c in clips], side=4))
    assert encoders.decoded(latents).shape == (2, 1, 3, 32, 32)


def test_frames_and_seconds() -> None:
    wide = torch.arange(64, dtype=torch.uint8).expand(1, 3, 32, 64).contiguous()
    exact(first_frame(wide, 32), wide[..., 16:48])
    assert first_frame(picture(0, 33, 90)[None], 16).shape == (1, 3, 16, 16)
    flat = torch.full((2, 3, 50, 70), 77, dtype=torch.uint8)
    assert first_frame(flat, 24).eq(77).all()
    assert [len(spread_frames(clip(0, count))) for count in (1, 2, 9)] == [FRAMES_READ] * 3
    assert [len(whole_seconds(torch.zeros(n))) for n in (895, 16_000, 16_001)] == [16_000, 16_000, 32_000]
    exact(whole_seconds(sound(0))[:9000], sound(0))


def test_only_what_is_needed_is_loaded(checkpoints: Path) -> None:
    """A source that is not there is no fault until its medium comes."""
    encoders = Encoders(vision=checkpoints / "dinov2", audio="no/such", video="no.safetensors")
    model = ArbModel(CONFIG, device="cpu", ops="reference").use_encoders(encoders)
    model.loss(random_ids(1, 6), images=[picture(0)])
    with pytest.raises(SidecarError, match="no/such"):
        model.loss(random_ids(1, 6), sounds=[sound(0)])
    with pytest.raises(SidecarError, match="no audio sidecar"):
        Encoders(vision=checkpoints / "dinov2").sounds([sound(0)])


def test_cached_features_depend_on_their_content_alone(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was read beside them, in whatever order; and each is read once."""
    vision, images = VisionSidecar.load(checkpoints / "dinov2"), [picture(seed) for seed in range(3)]
    calls: list[int] = []
    real = VisionSidecar.forward

    def counted(self: VisionSidecar, images: Any) -> Tensor:
        calls.append(len(images))
        return real(self, images)

    monkeypatch.setattr(VisionSidecar, "forward", counted)
    encoders = Encoders(vision=vision, cache=FeatureCache(tmp_path / "a"))
    first, again = encoders.pictures(images), encoders.pictures(images[::-1])
    exact(again, first.flip(0))
    assert calls == [1, 1, 1]
    alone = Encoders(vision=vision, cache=FeatureCache(tmp_path / "b"))
    exact(alone.pictures(images[2:]), first[2:])
    assert encoders.pictures([picture(9)]).ne(first[0]).any()


def test_a_text_is_led_by_what_stands_before_it(model: ArbModel) -> None:
    """The first byte is the likeliest one after the picture, the marks and the prompt, and each prompt has its own picture."""
    images = [picture(0), picture(1)]
    options: dict[str, Any] = {"max_new_bytes": 3, "temperature": 0, "images": images}
    texts = model.generate([b"ab", b""], **options)
    for text, prompt, image in zip(texts, (b"ab", b""), images, strict=True):
        features = {"image_BNF": model._features(images=[image])["image_BNF"]}
        ids_BT = torch.tensor([[*lead_of(features), *prompt]])
        with torch.no_grad():
            assert text[0] == model(ids_BT, **features)[0, -1, :256].argmax()
        assert model.generate([prompt], **{**options, "images": [image]}) == [text]
    # Marks count among the context, so that a byte of the prompt is read here.
    assert model.generate([b"zzab", b"zz"], context=5, **options)[0] == texts[0]


def test_encoders_are_no_part_of_the_state(model: ArbModel, encoders: Encoders) -> None:
    plain = ArbModel(CONFIG, device="cpu", ops="reference")
    assert model.state_dict().keys() == plain.state_dict().keys() and model.num_weights == plain.num_weights
    twin = copy.deepcopy(model)
    assert twin.encoders is not None and twin.encoders.sidecar("vision") is encoders.sidecar("vision")


@pytest.mark.parametrize(
    ("media", "error", "says"),
    [
        ({"images": [], "clips": []}, ValueError, "images and clips are given"),
        ({"images": [picture(0).float()]}, TypeError, "image 0 has dtype float32"),
        ({"images": []}, ValueError, "images is empty"),
        ({"sounds": []}, ValueError, "clips is empty"),
        ({"clips": [picture(0)]}, ValueError, "frames has shape"),
        ({"sounds": [sound(0, 10)]}, ValueError, "clip 0 has shape"),
        ({"images": [picture(0)] * 2}, ValueError, "image_BNF has a batch of 2"),
        (
            {"images": [picture(0)], "image_BNF": torch.zeros(1, 4, 48)},
            ValueError,
            "image_BNF is given beside",
        ),
    ],
)
def test_media_that_do_not_fit(
    model: ArbModel, media: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model.loss(random_ids(1, 6), **media)


def test_a_prompt_has_a_picture_of_its_own(model: ArbModel) -> None:
    with pytest.raises(ValueError, match="image_BNF has 2 samples, but must have 1, one for each prompt"):
        model.generate("a", images=[picture(0), picture(1)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_features": 0, "image_codes": 0}, "image_features of the model is 0"),
        ({"image_features": 36}, "the vision sidecar gives 48 features, but must give 36"),
    ],
)
def test_a_model_that_reads_no_such_features(encoders: Encoders, changes: dict[str, int], says: str) -> None:
    model = ArbModel(replace(CONFIG, **changes), device="cpu", ops="reference").use_encoders(encoders)
    with pytest.raises(ValueError, match=says):
        model.loss(random_ids(1, 6), images=[picture(0)])


def test_without_encoders_raw_media_are_refused() -> None:
    model = ArbModel(CONFIG, device="cpu", ops="reference")
    with pytest.raises(ValueError, match="the model has no encoders"):
        model.loss(random_ids(1, 6), images=[picture(0)])


def test_sidecars_stand_in_their_own_place(checkpoints: Path) -> None:
    with pytest.raises(TypeError, match="audio is a VisionSidecar, but must be a AudioSidecar"):
        Encoders(audio=VisionSidecar.load(checkpoints / "dinov2"))
    with pytest.raises(ValueError, match="video_config is"):
        Encoders(video_config=checkpoints / "vae")
