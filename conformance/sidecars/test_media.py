"""Files of any format become tensors, or a sentence."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from arbitor.sidecars import SidecarError, read_audio, read_image, read_video
from conformance.compare import exact


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 12, columns * 8, rows + columns], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I"]
)
def test_every_mode(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    picture = Image.fromarray(gradient())
    if mode in ("I;16", "I"):
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        picture = Image.fromarray(grey if mode == "I;16" else grey.astype(np.int32))
    else:
        picture = picture.convert(mode)
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "YCbCr", "LAB", "I") else "picture.png")
    if mode == "HSV":
        picture = picture.convert("RGB")
    picture.save(path)
    found = read_image(path)
    assert found.dtype is torch.uint8 and found.shape == (3, 20, 30) and found.is_contiguous()
    if mode in ("RGB", "HSV", "RGBA"):
        assert int((found.movedim(0, 2).int() - torch.from_numpy(gradient()).int()).abs().max()) <= (
            9 if mode == "HSV" else 0
        )
    if mode in ("L", "I;16", "I"):
        exact(found[0], torch.from_numpy(np.array(Image.fromarray(gradient()).convert("L"))))


def test_transparency_shows_white(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels, "RGBA").save(tmp_path / "half.png")
    found = read_image(tmp_path / "half.png")
    assert found[:, :2].eq(0).all() and found[:, 2:].eq(255).all()


def test_pictures_stand_upright(tmp_path: Path) -> None:
    """A camera notes how it was held; 6 is a quarter turn to the right."""
    from PIL import Image

    picture = Image.fromarray(gradient())
    notes = picture.getexif()
    notes[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=notes)
    want = torch.from_numpy(gradient()).movedim(2, 0).rot90(-1, (1, 2))
    exact(read_image(tmp_path / "turned.png"), want.contiguous())


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((9, 9, 3), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "moves.webp").eq(10).all()


def sine(rate: int, *, seconds: float = 0.5, hertz: float = 440.0) -> Tensor:
    return (torch.arange(int(rate * seconds)) * (2 * torch.pi * hertz / rate)).sin() * 0.5


def save_wave(path: Path, channels: Tensor, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).round().to(torch.int16).contiguous().numpy().tobytes())


def test_sound_at_its_own_rate(tmp_path: Path) -> None:
    save_wave(tmp_path / "a.wav", sine(16_000)[None], 16_000)
    found = read_audio(tmp_path / "a.wav")
    assert found.dtype is torch.float32 and len(found) == 8000
    assert float((found - sine(16_000)).abs().max()) < 1e-4


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_sound_is_resampled(tmp_path: Path, rate: int) -> None:
    """The whole length arrives, the end included, and a tone stays the tone it was."""
    save_wave(tmp_path / "a.wav", sine(rate)[None], rate)
    found = read_audio(tmp_path / "a.wav")
    assert abs(len(found) - 8000) <= 20
    middle = found[2000:6000]
    lag = torch.arange(len(middle)) * (2 * torch.pi * 440 / 16_000)
    strength = torch.stack([(middle * lag.sin()).mean(), (middle * lag.cos()).mean()]).norm() * 2
    assert 0.47 < float(strength) < 0.53


def test_channels_are_averaged(tmp_path: Path) -> None:
    save_wave(tmp_path / "a.wav", torch.stack([sine(16_000), torch.zeros(8000)]), 16_000)
    found = read_audio(tmp_path / "a.wav")
    scale = float(found.abs().max() / sine(16_000).abs().max())
    # FFmpeg weighs two channels by a half or by the root of it.
    assert 0.49 < scale < 0.72
    assert float((found / scale - sine(16_000)).abs().max()) < 1e-3


def save_video(path: Path, frames: np.ndarray, rate: int = 10) -> None:
    import av

    lossless = path.suffix == ".mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=rate)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv444p" if lossless else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_video(tmp_path: Path, suffix: str) -> None:
    frames = np.stack([np.full((32, 48, 3), value, dtype=np.uint8) for value in range(0, 250, 25)])
    save_video(tmp_path / f"a{suffix}", frames)
    found = read_video(tmp_path / f"a{suffix}")
    assert found.frames.shape == (10, 3, 32, 48) and found.frames_per_second == 10 and not found.more
    assert int((found.frames.float().mean((1, 2, 3)) - torch.arange(0, 250, 25)).abs().max()) <= 6
    some = read_video(tmp_path / f"a{suffix}", max_frames=3, every=2)
    exact(some.frames, found.frames[0:6:2])
    assert some.more and some.frames_per_second == 5


@pytest.mark.parametrize("read", [read_image, read_audio, read_video])
def test_what_cannot_be_decoded(tmp_path: Path, read: object) -> None:
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("noise.bin", "empty"):
        with pytest.raises(SidecarError, match=name) as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    for gone in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(SidecarError, match="no file that exists"):
            read(gone)


def test_a_file_without_the_track(tmp_path: Path) -> None:
    save_wave(tmp_path / "a.wav", sine(16_000)[None], 16_000)
    with pytest.raises(SidecarError, match="no pictures"):
        read_video(tmp_path / "a.wav")
    save_video(tmp_path / "a.mkv", np.zeros((2, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(SidecarError, match="no sound"):
        read_audio(tmp_path / "a.mkv")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    save_wave(tmp_path / "a.wav", sine(16_000)[None], 16_000)
    with pytest.raises(SidecarError, match=r"longer than 0\.2 s"):
        read_audio(tmp_path / "a.wav", max_seconds=0.2)
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr("arbitor.sidecars.media.MAX_PIXELS", 599)
    with pytest.raises(SidecarError, match="at most 599 pixels"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="every is 0"):
        read_video(tmp_path / "a.wav", every=0)


def test_a_picture_of_a_real_camera() -> None:
    """A photograph that matplotlib ships."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    assert read_image(path).shape == (3, 600, 512)
