"""What goes into a sidecar is prepared as its authors did, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arbitor.sidecars import AudioSidecar, VideoSidecar, VisionSidecar, audio_frames, whole_clip
from arbitor.sidecars.audio import MIN_SAMPLES
from conformance.compare import exact

MEAN, STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def vision(checkpoints: Path) -> VisionSidecar:
    return VisionSidecar.load(checkpoints / "dinov2")


@pytest.fixture(scope="module")
def audio(checkpoints: Path) -> AudioSidecar:
    return AudioSidecar.load(checkpoints / "moonshine")


@pytest.fixture(scope="module")
def video(checkpoints: Path) -> VideoSidecar:
    return VideoSidecar.load(checkpoints / "vae" / "pig_vae.safetensors", config=checkpoints / "vae")


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("size", [(224, 224), (256, 300), (37, 500), (600, 41)])
def test_pixels_by_hand(vision: VisionSidecar, size: tuple[int, int]) -> None:
    """Shortest edge to 256, bicubic; the centre 224; to [0, 1]; ImageNet's mean and deviation."""
    from PIL import Image

    image = picture(*size)
    height, width = size
    wanted = (256, 256 * width // height) if height <= width else (256 * height // width, 256)
    resized = Image.fromarray(image.movedim(0, 2).numpy()).resize(wanted[::-1], Image.Resampling.BICUBIC)
    top, left = (wanted[0] - 224) // 2, (wanted[1] - 224) // 2
    crop = np.asarray(resized)[top : top + 224, left : left + 224].astype(np.float64) / 255
    want = torch.from_numpy((crop - MEAN) / STD).movedim(2, 0)
    got = vision.pixels([image])[0]
    assert got.shape == want.shape and float((got - want).abs().max()) < 1e-5


def test_a_picture_has_256_patches(vision: VisionSidecar) -> None:
    assert vision([picture(300, 200), picture(64, 64)]).shape == (2, 256, vision.num_features)


def test_pictures_do_not_see_each_other(vision: VisionSidecar) -> None:
    both = vision([picture(240, 240, 1), picture(240, 240, 2)])
    alone = vision([picture(240, 240, 2)])
    assert float((both[1] - alone[0]).norm() / alone[0].norm()) < 1e-5


def test_the_token_of_the_whole_picture_is_left_out(vision: VisionSidecar) -> None:
    image = picture(224, 224)
    with torch.no_grad():
        hidden = vision.network(pixel_values=vision.pixels([image])).last_hidden_state
    exact(vision([image]), hidden[:, 1:])


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        ([], ValueError, "images is empty"),
        ([torch.rand(3, 20, 20)], TypeError, "image 0 has dtype float32"),
        ([picture(20, 20), picture(20, 20)[:1]], ValueError, "image 1 has shape"),
        ([picture(20, 20)[None]], ValueError, "image 0 has shape"),
        ([torch.zeros(3, 0, 5, dtype=torch.uint8)], ValueError, "image 0 has shape"),
        ([picture(2, 130)], ValueError, "image 0 is 130 x 2, but its longer side may be at most 64 times"),
    ],
)
def test_no_picture(vision: VisionSidecar, images: list[Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vision(images)


@given(samples=st.integers(0, 4000))
def test_frames_of_samples(samples: int) -> None:
    """As the three convolutions count, by the library's own formula of a convolution."""
    x = torch.zeros(1, 1, samples, device="meta")
    want = 0
    if samples >= MIN_SAMPLES:
        for kernel, stride in ((127, 64), (7, 3), (3, 2)):
            x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, kernel, device="meta"), stride=stride)
        want = x.shape[-1]
    assert audio_frames(samples) == want
    assert (want > 0) == (samples >= MIN_SAMPLES)


@pytest.mark.parametrize(("samples", "frames"), [(MIN_SAMPLES, 1), (16_000, 40), (15_360, 38)])
def test_the_network_gives_as_many_frames(audio: AudioSidecar, samples: int, frames: int) -> None:
    [features] = audio([torch.zeros(samples)])
    assert features.shape == (frames, audio.num_features) and audio_frames(samples) == frames


def test_a_clip_does_not_depend_on_its_neighbours(audio: AudioSidecar) -> None:
    """Padding a clip would change the features of all of its frames, so clips of other lengths are read apart."""
    rng = torch.Generator().manual_seed(0)
    clips = [torch.rand(length, generator=rng) - 0.5 for length in (4000, 9000, 4000)]
    together, alone = audio(clips), [audio([clip])[0] for clip in clips]
    for got, want in zip(together, alone, strict=True):
        assert got.shape == want.shape and float((got - want).norm() / want.norm()) < 1e-5


def test_the_encoder_alone_gives_the_same_features(checkpoints: Path, audio: AudioSidecar) -> None:
    alone = AudioSidecar.load(checkpoints / "moonshine", encoder_only=True)
    clip = torch.linspace(-0.5, 0.5, 5000)
    exact(alone([clip])[0], audio([clip])[0])
    count = lambda sidecar: sum(p.numel() for p in sidecar.network.parameters())  # noqa: E731
    assert count(alone) < count(audio)


@pytest.mark.parametrize(
    ("clip", "error", "says"),
    [
        (torch.zeros(5000, dtype=torch.int16), TypeError, "clip 0 has dtype int16"),
        (torch.zeros(MIN_SAMPLES - 1), ValueError, "at least 895"),
        (torch.zeros(2, 5000), ValueError, "clip 0 has shape"),
        (torch.full((5000,), 1.5), ValueError, "magnitude 1.5"),
        (torch.full((5000,), float("nan")), ValueError, "magnitude nan"),
    ],
)
def test_no_sound(audio: AudioSidecar, clip: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        audio([clip])


@given(count=st.integers(1, 20), height=st.integers(8, 40), width=st.integers(8, 40))
def test_whole_clips(count: int, height: int, width: int) -> None:
    clip = whole_clip(torch.zeros(count, 3, height, width, dtype=torch.uint8))
    kept = clip.frames.shape
    assert kept[0] % 4 == 1 and kept[0] + clip.dropped == count and clip.dropped < 4
    for side, full, cut in zip(kept[2:], (height, width), clip.cropped, strict=True):
        assert side % 8 == 0 and side + cut == full and cut < 8
    again = whole_clip(clip.frames)
    assert again.dropped == 0 and again.cropped == (0, 0)


def test_a_clip_keeps_its_middle() -> None:
    frames = torch.arange(13, dtype=torch.uint8).view(1, 1, 1, 13).expand(1, 3, 8, 13)
    exact(whole_clip(frames).frames[0, 0, 0], torch.arange(2, 10, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("shape", "latent"),
    [((2, 1, 3, 64, 64), (2, 16, 1, 8, 8)), ((1, 5, 3, 32, 48), (1, 16, 2, 4, 6))],
)
def test_latents_have_the_seeds_shape(
    video: VideoSidecar, shape: tuple[int, ...], latent: tuple[int, ...]
) -> None:
    """REFACTOR11: [1, 3, 4, 64, 64] -> [1, 16, 1, 8, 8] -> [1, 3, 1, 64, 64]; three of its four frames are dropped there."""
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    latents = video.encode(frames)
    assert latents.shape == latent
    back = video.decode(latents)
    assert back.shape == shape and back.dtype is torch.uint8


def test_four_frames_are_not_cut_in_silence(video: VideoSidecar) -> None:
    frames = torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="whole_clip cuts 3 frames"):
        video.encode(frames)
    assert video.encode(whole_clip(frames[0]).frames[None]).shape == (1, 16, 1, 8, 8)


def test_pixels_of_video_as_the_library_has_them(
    video: VideoSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.video_processor import VideoProcessor

    frames, seen = torch.randint(0, 256, (1, 5, 3, 16, 16), dtype=torch.uint8), []
    original = video.network.encode
    monkeypatch.setattr(video.network, "encode", lambda x: seen.append(x) or original(x))
    video.encode(frames)
    pictures = [[frame.movedim(0, 2).numpy().astype(np.float32) / 255 for frame in frames[0]]]
    want = VideoProcessor(vae_scale_factor=8).preprocess_video([np.stack(pictures[0])])
    assert seen[0].shape == want.shape and float((seen[0] - want).abs().max()) < 1e-6


def test_latents_are_normed_by_the_config(video: VideoSidecar) -> None:
    frames = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        raw = video.network.encode(frames.movedim(1, 2).float() / 127.5 - 1).latent_dist.mode()
    config = video.network.config
    for channel in range(16):
        want = (raw[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        assert float((video.encode(frames)[:, channel] - want).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("latents", "error", "says"),
    [
        (torch.zeros(1, 16, 1, 4, 4, dtype=torch.int64), TypeError, "latents has dtype int64"),
        (torch.zeros(1, 15, 1, 4, 4), ValueError, "latents has shape"),
        (torch.zeros(1, 16, 4, 4), ValueError, "latents has shape"),
    ],
)
def test_no_latents(video: VideoSidecar, latents: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        video.decode(latents)
