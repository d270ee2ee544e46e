"""Pictures of shapes, sounds of vowels and videos of shapes, each with a text of slots. Nothing is downloaded.

Everything is drawn from a seed. No two files of a kind are equal, since sizes, places, pitches and noise are drawn too.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from arbitor.sidecars.libraries import library

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 190, 40),
    "blue": (40, 60, 230),
    "white": (245, 245, 245),
}
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "grey": (120, 120, 120),
    "pink": (250, 160, 190),
}
SHAPES = ("square", "bar", "frame")
PLACES: Mapping[str, tuple[int, int]] = {
    "left": (16, 8),
    "right": (16, 24),
    "top": (8, 16),
    "bottom": (24, 16),
}
VOWELS: Mapping[str, tuple[int, int]] = {
    "ah": (750, 1200),
    "ee": (300, 2300),
    "oo": (320, 800),
    "eh": (550, 1800),
}
"""Values of the slots: colours in RGB, places of a shape's middle in a frame of 32 x 32, and two formants in Hz."""

SLOTS: Mapping[str, tuple[Sequence[str], ...]] = {
    "image": (tuple(COLOURS), SHAPES, tuple(GROUNDS)),
    "audio": (tuple(VOWELS),) * 2,
    "video": (tuple(PLACES), tuple(COLOURS)),
}
"""The slots of a text of each kind, in order, with their values."""

TEMPLATES = {"image": "a {} {} on {}", "audio": "{} {}", "video": "show the {} of a {} room"}
"""The text of each kind, with a place for each slot."""

SIDE = 56
"""Side of a picture, in pixels: four patches."""

FRAME_SIDE = 32
"""Side of a video frame, in pixels."""

RATE = 16_000
"""Samples of a second."""

PITCHES = (90.0, 220.0)
"""Range of the pitch of a vowel, in Hz."""


def render(root: Path, *, count: int, seed: int = 0) -> None:
    """Write the folders `image`, `audio` and `video`, each with files and their texts.

    Args:
        root: folder to write into.
        count: files of each kind.
        seed: of all that is drawn.
    """
    writers: dict[str, tuple[str, Callable[[Path, Sequence[str], np.random.Generator], None]]] = {
        "image": (".png", _write_picture),
        "audio": (".wav", _write_sound),
        "video": (".mkv", _write_video),
    }
    for number, (kind, (suffix, write)) in enumerate(writers.items()):
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        for index in range(count):
            values = [str(slot[int(rng.integers(len(slot)))]) for slot in SLOTS[kind]]
            write(folder / f"{index:05d}{suffix}", values, rng)
            (folder / f"{index:05d}.txt").write_text(TEMPLATES[kind].format(*values))


def values_of(kind: str, text: bytes) -> list[str]:
    """Return the values of the slots of a text: its words at the places where the template has slots."""
    words = text.decode("ascii", errors="replace").split()
    places = [place for place, word in enumerate(TEMPLATES[kind].split()) if word == "{}"]
    return [words[place] if place < len(words) else "" for place in places]


def slot_bits(kind: str) -> float:
    """Return the bits of the slots of a text, which nobody can save who does not see the medium."""
    return sum(math.log2(len(slot)) for slot in SLOTS[kind])


def _write_picture(path: Path, values: Sequence[str], rng: np.random.Generator) -> None:
    colour, shape, ground = values
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.float64)
    pixels[:] = GROUNDS[ground]
    size = int(rng.integers(22, 31))
    top, left = (int(rng.integers(4, SIDE - size - 4)) for _ in range(2))
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    inside[top : top + size, left : left + size] = True
    if shape == "bar":
        inside[: top + size // 3] = False
        inside[top + 2 * size // 3 :] = False
    if shape == "frame":
        inside[top + 5 : top + size - 5, left + 5 : left + size - 5] = False
    pixels[inside] = COLOURS[colour]
    pixels += rng.normal(0, 4, pixels.shape)
    library("PIL.Image").fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def _write_sound(path: Path, values: Sequence[str], rng: np.random.Generator) -> None:
    """Write a second of vowels: harmonics of a pitch, as loud as they are near the formants of the vowel."""
    part = RATE // len(values)
    pieces = []
    for vowel in values:
        pitch, time = rng.uniform(*PITCHES), np.arange(part) / RATE
        piece = np.zeros(part)
        for harmonic in range(1, int(4000 / pitch)):
            loudness = sum(
                math.exp(-(((harmonic * pitch - formant) / 120) ** 2)) for formant in VOWELS[vowel]
            )
            piece += (loudness + 0.01) * np.sin(
                2 * math.pi * harmonic * pitch * time + rng.uniform(0, 2 * math.pi)
            )
        pieces.append(piece / np.abs(piece).max() * np.hanning(part) ** 0.25)
    samples = np.concatenate(pieces) * rng.uniform(0.3, 0.8)
    samples += rng.normal(0, 0.003, len(samples))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def _write_video(path: Path, values: Sequence[str], rng: np.random.Generator) -> None:
    """Write a dark square that shrinks at a place of a coloured frame. The codec loses nothing; the first frame is a target."""
    place, colour = values
    av = library("av")
    row, column = (middle + int(rng.integers(-1, 2)) for middle in PLACES[place])
    noise = rng.normal(0, 3, (FRAME_SIDE, FRAME_SIDE, 3))
    # Without a random number of the writer, so that the same seed gives the same bytes.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = FRAME_SIDE, FRAME_SIDE, "yuv444p"
        for half in (7, 5):
            pixels = np.full((FRAME_SIDE, FRAME_SIDE, 3), COLOURS[colour]) + noise
            pixels[row - half : row + half, column - half : column + half] = 20.0
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
