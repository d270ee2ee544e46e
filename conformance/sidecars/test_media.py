"""Files of any format become tensors, or a sentence."""

from __future__ import annotations

import os
import resource
import struct
import warnings
import wave
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from arbitor.sidecars import Blob, MachineError, SidecarError, read_audio, read_frames, read_image, read_video
from arbitor.sidecars.audio import refuse_clip
from arbitor.sidecars.encoders import first_frame, spread_frames
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


@contextmanager
def no_more_open_files() -> Iterator[None]:
    """Refuse this process another open file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as newest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (newest.fileno(), limits[1]))
    held = []
    try:
        # Numbers below the limit may be free.
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("read", [read_image, read_audio, read_video])
def test_a_machine_that_is_short_of_something_blames_no_file(
    media: Path, read: Callable[[Path], object]
) -> None:
    """Who leaves out files that cannot be decoded would leave out this one."""
    kinds = {read_image: "image/00.png", read_audio: "audio/00.wav", read_video: "video/00.mkv"}
    path = media / kinds[read]
    # What the library imports and opens once is there then.
    read(path)
    with no_more_open_files(), pytest.raises(MachineError, match=r"cannot be decoded .*Too many open files"):
        read(path)
    read(path)


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
    # Also one whose last samples the resampler gives at its end alone.
    save_wave(tmp_path / "slow.wav", sine(8_000, seconds=0.5005)[None], 8_000)
    with pytest.raises(SidecarError, match=r"longer than 0\.5 s"):
        read_audio(tmp_path / "slow.wav", max_seconds=0.5)
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    save_video(tmp_path / "a.mkv", np.stack([gradient()] * 4))
    with monkeypatch.context() as patch:
        patch.setattr("arbitor.sidecars.media.MAX_FRAME_BYTES", 3 * 3 * 600)
        assert len(read_video(tmp_path / "a.mkv", max_frames=3).frames) == 3
        with pytest.raises(SidecarError, match=r"more than 5,400 bytes of pixels .*ask for fewer"):
            read_video(tmp_path / "a.mkv")
    monkeypatch.setattr("arbitor.sidecars.media.MAX_PIXELS", 599)
    # Before a frame is decoded.
    monkeypatch.setattr("arbitor.sidecars.media._frames", lambda *_: pytest.fail("a frame was decoded"))
    for read, name in ((read_image, "a.png"), (read_video, "a.mkv")):
        with pytest.raises(
            SidecarError, match="is larger than the 599 pixels that a picture or a frame may have"
        ):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="every is 0"):
        read_video(tmp_path / "a.wav", every=0)


def test_a_picture_of_a_real_camera() -> None:
    """A photograph that matplotlib ships."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    assert read_image(path).shape == (3, 600, 512)


def test_a_picture_that_claims_more_than_memory_is_a_sentence(tmp_path: Path) -> None:
    """Above Pillow's own bound too."""
    from PIL import Image

    Image.fromarray(gradient()).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    for side in (12_000, 2**31 - 1):
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(SidecarError, match="is larger than the 134,217,728 pixels"):
            read_image(tmp_path / "a.png")


def test_a_picture_of_many_pixels_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of half of its own bound, and where warnings are errors a picture could not be read."""
    from PIL import Image

    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").shape == (3, 20, 30)


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under another name would run Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *arguments: pytest.fail("Ghostscript was asked")
    )
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(SidecarError, match=r"a\.png' cannot be decoded"):
        read_image(path)


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile other.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_no_file_leads_to_another(tmp_path: Path, content: str) -> None:
    """A file of sound may be a list of other files, or of addresses."""
    save_wave(tmp_path / "other.wav", sine(16_000)[None], 16_000)
    for name in ("list.wav", "list.m3u8"):
        (tmp_path / name).write_text(content)
        for read in (read_audio, read_video):
            with pytest.raises(
                SidecarError, match=f"{name}' (is no sound or video of a format|cannot be decoded)"
            ):
                read(tmp_path / name)


def test_a_name_is_no_address_and_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_wave(Path("http:a.wav"), sine(16_000)[None], 16_000)
    assert len(read_audio("http:a.wav")) == 8000
    for name in ("1.png", "%d.png"):
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SidecarError, match="is no sound or video of a format that is read"):
        read_video("%d.png")


def wave_bytes(rate: int, *, channels: int = 1, floats: bool = False, data: bytes = bytes(4000)) -> bytes:
    """Return a WAV file with a header that says whatever it likes."""
    size = channels * (4 if floats else 2)
    said = struct.pack(
        "<HHIIHH", 3 if floats else 1, channels, rate, rate * size % 2**32, size, 32 if floats else 16
    )
    parts = b"WAVEfmt " + struct.pack("<I", 16) + said + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wave_bytes(1), "has 1 samples a second, but must have 1,000 to 1,000,000"),
        (wave_bytes(10**9), "has 1,000,000,000 samples a second"),
        (wave_bytes(1000, data=bytes(400_000)), "lasts longer than 100 s"),
        (wave_bytes(16_000, channels=9), "has 9 channels, but may have at most 8"),
        (wave_bytes(16_000, channels=0), "cannot be decoded"),
    ],
)
def test_headers_that_ask_for_too_much(content: bytes, says: str) -> None:
    """Nothing is resampled before its length is known: a sample a second becomes 16,000."""
    with pytest.raises(SidecarError, match=says):
        read_audio(Blob("a.wav", content), max_seconds=100)


def test_a_long_sound_is_not_decoded_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from arbitor.sidecars import media

    taken = []

    def frames(container: object, stream: object) -> Iterator[object]:
        for frame in container.decode(stream):  # type: ignore[attr-defined]
            taken.append(frame.samples)
            yield frame

    monkeypatch.setattr(media, "_frames", frames)
    with pytest.raises(SidecarError, match="lasts longer than 1 s"):
        read_audio(Blob("a.wav", wave_bytes(16_000, data=bytes(2 * 16_000 * 60))), max_seconds=1)
    assert sum(taken) < 2 * 16_000


def test_a_frame_that_lasts_too_long_is_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of some bytes may last for days."""
    import av

    class Resampler:
        def __init__(self, **_: object) -> None: ...

        def resample(self, frame: object) -> None:
            pytest.fail("the frame was resampled")

    monkeypatch.setattr(av, "AudioResampler", Resampler)
    with pytest.raises(SidecarError, match=r"lasts longer than 0\.01 s"):
        read_audio(Blob("a.wav", wave_bytes(1000)), max_seconds=0.01)


def test_a_video_of_no_frames_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that was cut off."""
    save_video(tmp_path / "a.mkv", np.zeros((2, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr("arbitor.sidecars.media._frames", lambda *_: iter(()))
    for read in (read_video, lambda path: read_frames(path, 4)):
        with pytest.raises(SidecarError, match=r"a\.mkv' has no frame that can be decoded"):
            read(tmp_path / "a.mkv")


def test_sounds_of_eight_channels_and_of_none() -> None:
    assert read_audio(Blob("a", wave_bytes(16_000, channels=8, data=bytes(1600)))).shape == (100,)
    assert read_audio(Blob("a", wave_bytes(16_000, data=b""))).shape == (0,)
    nan = read_audio(Blob("a", wave_bytes(16_000, floats=True, data=np.full(2000, np.nan, "<f4").tobytes())))
    with pytest.raises(ValueError, match="a sound has a sample of magnitude nan"):
        refuse_clip("a sound", nan)


def test_frames_spread_over_a_video(tmp_path: Path) -> None:
    """They are those that are picked of all frames; a short video repeats some."""
    for count in (1, 3, 4, 10):
        frames = np.stack([np.full((33, 47, 3), value, dtype=np.uint8) for value in range(5, 5 + count)])
        save_video(tmp_path / "a.mkv", frames)
        exact(read_frames(tmp_path / "a.mkv", 4), spread_frames(read_video(tmp_path / "a.mkv").frames))
    save_wave(tmp_path / "a.wav", sine(16_000)[None], 16_000)
    with pytest.raises(SidecarError, match="no pictures"):
        read_frames(tmp_path / "a.wav", 4)


def test_of_a_long_video_the_first_frames_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than MAX_FRAMES the first so many count, and no later one is decoded again."""
    from arbitor.sidecars import media

    taken, decoded = [], media._frames

    def frames(container: object, stream: object) -> Iterator[object]:
        for frame in decoded(container, stream):
            taken.append(frame)
            yield frame

    save_video(
        tmp_path / "a.mkv", np.stack([np.full((33, 47, 3), value, dtype=np.uint8) for value in range(10)])
    )
    want = read_video(tmp_path / "a.mkv").frames[[0, 2, 4]]
    monkeypatch.setattr(media, "MAX_FRAMES", 5)
    monkeypatch.setattr(media, "_frames", frames)
    exact(read_frames(tmp_path / "a.mkv", 3), want)
    # Once to count them, which takes one more, and once to keep some.
    assert len(taken) == 6 + 5


def test_frames_of_two_sizes_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    parts = []
    for size in ((32, 32), (48, 64)):
        Image.new("RGB", size).save(tmp_path / "a.jpg")
        parts.append((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "a.mjpeg").write_bytes(b"".join(parts))
    for read in (read_video, lambda path: read_frames(path, 4)):
        with pytest.raises(SidecarError, match="has frames of 32 x 32 and 48 x 64, but must have one size"):
            read(tmp_path / "a.mjpeg")
    # A frame may be larger than the file says.
    monkeypatch.setattr("arbitor.sidecars.media.MAX_PIXELS", 32 * 32)
    with pytest.raises(SidecarError, match="is larger than the 1,024 pixels"):
        read_video(tmp_path / "a.mjpeg")


def test_a_thin_picture_is_refused_before_it_is_resized() -> None:
    """A picture of 1 x 100,000 would become one of 256 x 25,600,000."""
    for shape in ((3, 8, 513), (3, 520, 8)):
        with pytest.raises(ValueError, match="its longer side may be at most 64 times its shorter one"):
            first_frame(torch.zeros(1, *shape, dtype=torch.uint8), 16)
    assert first_frame(torch.zeros(1, 3, 8, 512, dtype=torch.uint8), 16).shape == (1, 3, 16, 16)
