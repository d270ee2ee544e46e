"""Folders of media: which files are data, what their texts are, what is held out, and what is refused. Nothing is decoded."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.media import check_kinds, weights_of
from arbitor.optimized.training.media_batch import Batch
from arbitor.optimized.training.media_files import MediaFolder, load_media
from arbitor.optimized.training.media_losses import mean_losses
from arbitor.optimized.training.options import CHANGES, ROWS, TrainOptions
from arbitor.optimized.training.plan import decide
from arbitor.reference.graph.ranks import Ranks


def fill(folder: Path, number: int = 4, suffix: str = ".png") -> Path:
    """Write files of different content, each with a text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        (folder / f"{index}{suffix}").write_bytes(b"content %d" % index)
        (folder / f"{index}.txt").write_bytes(b"text  %d\r\n" % index)
    return folder


def texts(found: MediaFolder) -> dict[str, list[bytes]]:
    """Return the texts by the names of the files."""
    by_name: dict[str, list[bytes]] = {}
    for item in (*found.train, *found.validation):
        by_name.setdefault(item.path.name, []).append(item.text)
    return by_name


def test_texts_beside_files_are_one_line(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data")
    (folder / "3.txt").write_bytes(b" two\nlines\t and tabs ")
    found = load_media("image", str(folder))
    assert texts(found) == {
        "0.png": [b"text 0"],
        "1.png": [b"text 1"],
        "2.png": [b"text 2"],
        "3.png": [b"two lines and tabs"],
    }
    assert {item.content for item in found.train} >= {
        hashlib.sha256(item.path.read_bytes()).digest() for item in found.train
    }


def test_the_ends_of_names_may_be_of_any_case(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in (("0.PNG", b"a"), ("0.TXT", b"zero"), ("1.Png", b"b")):
        (folder / name).write_bytes(content)
    (folder / "m.JSONL").write_text('{"file_name": "1.Png", "text": "one"}')
    assert texts(load_media("image", str(folder))) == {"0.PNG": [b"zero"], "1.Png": [b"one"]}


def test_a_file_that_changes_during_a_run_is_refused(tmp_path: Path) -> None:
    """Its features would be kept under the digest of what it was."""
    folder = fill(tmp_path / "data")
    item = load_media("image", str(folder)).train[0]
    assert item.medium() == item.path
    item.path.write_bytes(b"another content")
    with pytest.raises(TrainingError, match="was changed since the run read it, but must stay as it is"):
        item.medium()
    item.path.unlink()
    with pytest.raises(TrainingError, match="cannot read the data file"):
        item.medium()


def test_texts_in_lines_of_json(tmp_path: Path) -> None:
    """As Hugging Face's folders have them, from the folder of the file on; several texts of a file are several items."""
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    lines: list[Any] = []
    for index in range(3):
        (folder / "part" / f"{index}.wav").write_bytes(b"sound %d" % index)
        lines += [{"file_name": f"part/{index}.wav", "text": f"a {index}", "other": 1}]
    lines += [{"file": "part/0.wav", "transcription": "käse\nbrot"}]
    (folder / "metadata.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    found = load_media("audio", str(folder))
    want = {"0.wav": [b"a 0", "käse brot".encode()], "1.wav": [b"a 1"], "2.wav": [b"a 2"]}
    assert {name: sorted(found) for name, found in texts(found).items()} == want


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data")
    (folder / "4.PNG").write_bytes(b"no text")
    (folder / "5.png").symlink_to(folder / "0.png")
    (folder / "6.wav").write_bytes(b"another kind")
    fill(folder / ".git", 1)
    # What macOS adds, also beside files of lines and archives, which would be refused.
    for name in ("._0.png", "._0.txt", "._m.jsonl", "._a.tar"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    run = fill(folder / "run", 1)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("")
    found = load_media("image", str(folder))
    assert set(texts(found)) == {f"{index}.png" for index in range(4)}
    assert found.left_out["without text"] == ["4.PNG"] and "5.png" in found.left_out["linked"]
    assert "1 without text (4.PNG)" in found.description()


def test_a_tenth_is_held_out_whatever_files_are_called(tmp_path: Path) -> None:
    first = load_media("image", str(fill(tmp_path / "a", 30)))
    assert (len(first.train), len(first.validation)) == (27, 3)
    folder = fill(tmp_path / "b", 30)
    for path in sorted(folder.iterdir()):
        path.rename(folder / f"x{path.name}")
    second = load_media("image", str(folder))
    for part in ("train", "validation"):
        ours, theirs = ([(i.content, i.text) for i in getattr(each, part)] for each in (first, second))
        assert ours == theirs
    assert first.sha256 == second.sha256
    (folder / "x0.txt").write_bytes(b"another text")
    assert load_media("image", str(folder)).sha256 != first.sha256


def test_equal_files_are_on_one_side(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", 20)
    for index in range(20):
        (folder / f"twin{index}.png").write_bytes(b"content %d" % index)
        (folder / f"twin{index}.txt").write_bytes(b"other %d" % index)
    found = load_media("image", str(folder))
    sides = [{item.content for item in part} for part in (found.train, found.validation)]
    assert not sides[0] & sides[1] and len(found.validation) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "../0.png", "text": "a"}', "it names '../0.png', but there is no such file"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "it names '/etc/passwd', but there is no such file"),
        ('{"file_name": "0.png"}', "it has none of text, caption, transcription"),
        ('{"text": "a"}', "it has none of file_name, file"),
        ('{"file_name": "0.png", "text": 3}', "its text is int, but must be a string"),
        ('{"file_name": "0.png", "text": " "}', "its text is empty"),
        ('{"file_name": "0.png", "file_name": "1.png", "text": "a"}', "stands there twice"),
        ("[1]", "it is no object"),
        ("{", "it is no JSON"),
    ],
)
def test_a_line_of_json_that_says_nothing(tmp_path: Path, line: str, says: str) -> None:
    folder = fill(tmp_path / "data")
    (folder / "m.jsonl").write_text(f'{{"file_name": "0.png", "text": "fine"}}\n\n{line}\n')
    with pytest.raises(TrainingError) as caught:
        load_media("image", str(folder))
    assert "line 3 of" in str(caught.value) and says in str(caught.value)


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    for source, says in (
        (tmp_path / "none", "data_video must be a folder"),
        (fill(tmp_path / "one", 1, ".mp4"), "has 1 different files of video with a text, but needs two"),
        (fill(tmp_path / "pictures"), "has 0 different files of video"),
    ):
        with pytest.raises(TrainingError, match=says):
            load_media("video", str(source))
    pipe = fill(tmp_path / "pipe", 2, ".mp4")
    (pipe / "long.jsonl").write_bytes(b" " * 2**20 + b"\n" + b" " * (2**20 + 1))
    with pytest.raises(TrainingError, match=r"line 2 of '.*long\.jsonl' has more than 1,048,576 bytes"):
        load_media("video", str(pipe))


MEDIA: dict[str, Any] = {"data_image": "pictures", "vision": "facebook/dinov2-small"}


def test_kinds_and_their_weights() -> None:
    settings = decide(TrainOptions(preset="nano", **MEDIA), None)
    assert weights_of(settings) == {"text": 1, "image": 1}
    assert settings.vision == "facebook/dinov2-small" and Path(settings.data_image or "").is_absolute()
    mixed = decide(TrainOptions(preset="nano", mix="image=1.5, text=0", **MEDIA), None)
    assert {kind: float(weight) for kind, weight in weights_of(mixed).items()} == {"text": 0.0, "image": 1.5}
    assert ROWS["mix"].option.bound
    check_kinds(decide(TrainOptions(preset="nano"), None))


def test_a_run_on_one_kind_alone() -> None:
    """Names of the seeds' trainers, in the settings that they stand for. What the preset has already is not asked for."""
    for only, kind, changes in (
        ("vision", "image", MEDIA),
        ("audio", "audio", {"data_audio": "sounds", "audio": "UsefulSensors/moonshine-base"}),
        ("diffusion", "video", {"data_video": "videos", "video": "vae.safetensors"}),
    ):
        settings = decide(TrainOptions(preset="small", only=only, **changes), None)
        assert {kind: int(weight) for kind, weight in weights_of(settings).items()} == {"text": 0, kind: 1}
        switched = {name for name in CHANGES if getattr(settings, name)}
        assert switched == {f"enable_{kind}", "disable_moe"}
        settings = decide(TrainOptions(preset="tiny", only=only, **changes), None)
        assert {name for name in CHANGES if getattr(settings, name)} == {"disable_moe"}
    assert decide(TrainOptions(preset="small", only="text"), None) == replace(
        decide(TrainOptions(preset="small"), None), only="text"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {**MEDIA, "only": "text"},
            r"data_image is .*pictures', but must be left out of a run of text alone \(only\)",
        ),
        ({**MEDIA, "only": "audio"}, "data_image is .*, but must be left out of a run of audio alone"),
        (
            {**MEDIA, "only": "vision", "mix": "image=1"},
            "mix is 'image=1', but must be left out of a run of vision",
        ),
        ({"only": "vision"}, "only is 'vision', but needs data_image, which is what is learned"),
        ({"only": "smell"}, "only is 'smell', but must be one of text, vision, audio, diffusion"),
        ({"mix": "text=1"}, "does nothing with one kind of data"),
        ({**MEDIA, "mix": "text"}, "must be a list of KIND=NUMBER"),
        ({**MEDIA, "mix": "smell=1"}, "must be a list of KIND=NUMBER"),
        ({**MEDIA, "mix": "text=1,image=-1"}, "must be a decimal number"),
        ({**MEDIA, "mix": "text=1,image=1e999"}, "must be a decimal number"),
        ({**MEDIA, "mix": "text=1,image=1,image=2"}, "must have image once"),
        ({**MEDIA, "mix": "text=1,audio=1"}, "mix has audio, but the run has no data"),
        ({**MEDIA, "mix": "text=1"}, "a weight above 0 for image"),
        ({**MEDIA, "mix": "text=1,image=0"}, "a weight above 0 for image"),
        ({"data_image": "pictures"}, "data_image is .*pictures', but needs vision"),
        ({"vision": "facebook/dinov2-small"}, "does nothing without data_image"),
        ({"video": "vae.safetensors"}, "does nothing without data_video"),
        ({"feature_cache": "f"}, "does nothing without data of media"),
    ],
)
def test_settings_of_media_that_nothing_would_read(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decide(TrainOptions(preset="nano", **changes), None)


def test_held_out_batches_are_measured_without_gradients() -> None:
    """The mean is over bytes for the loss of bytes, and over samples for the others. A loss that is not finite is none."""
    seen: list[bool] = []
    losses = iter(
        [
            {"bytes": torch.tensor(2.0), "route": torch.tensor(1.0), "codebook": torch.tensor(9.0)},
            {"bytes": torch.tensor(4.0), "route": torch.tensor(math.inf)},
        ]
    )

    def asked(ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(torch.is_grad_enabled())
        return next(losses)

    model = SimpleNamespace(losses=asked, voting=SimpleNamespace(faults=torch.zeros(()), ranks=Ranks()))
    batches = [
        Batch("text", torch.zeros(2, 5, dtype=torch.int64)),
        Batch("text", torch.zeros(1, 7, dtype=torch.int64)),
    ]
    found = mean_losses(model, batches).named("val")  # type: ignore[arg-type]
    assert seen == [False, False]
    assert found == {"val_bpb": (2.0 * 4 + 4.0 * 4) / 8 / math.log(2), "val_route": None}
    assert mean_losses(model, []).named("val") == {"val_bpb": None}  # type: ignore[arg-type]
