"""`arb train --data-speech` teaches the talker, and `arb generate` writes what the video head and the talker answer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from arbitor import ArbModel
from arbitor.optimized import cli
from arbitor.optimized.training import media_mix, media_reader, media_speech
from arbitor.optimized.training.generate import first_window
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.media import lead_of
from arbitor.optimized.training.media_answer import chosen, prompt_ids
from arbitor.optimized.training.media_files import Item, load_media
from arbitor.optimized.training.media_reader import MediaReader
from arbitor.optimized.training.media_speech import load_codec, tokens_of, trained_codec, whole_frames
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.run_folder import CODEC_FILE
from arbitor.optimized.training.runtime import choose_runtime
from arbitor.reference.graph.codec import AudioCodec
from arbitor.reference.graph.talker import SPOKEN_STRIDE, spoken_marks
from arbitor.reference.graph.targets import NO_TOKEN
from arbitor.sidecars import (
    Encoders,
    MachineError,
    SidecarError,
    read_audio,
    read_image,
    read_video,
    write_audio,
    write_image,
    write_video,
)
from conformance.compare import exact
from conformance.sidecars import media_runs
from conformance.sidecars.media_runs import arb
from conformance.training.runs import train_until_killed

CONFIG = replace(media_runs.CONFIG, talker_tokens=289)
CPU = choose_runtime("cpu", "reference", "float32")


@pytest.fixture(scope="module", autouse=True)
def short(short: pytest.MonkeyPatch) -> None:
    """Let runs train a codec in two short steps."""
    short.setattr(media_speech, "CODEC_STEPS", 2)
    short.setattr(media_speech, "CODEC_BATCH", 2)


@pytest.fixture(scope="module")
def media(media: Path) -> Path:
    (media / "preset.json").write_text(CONFIG.to_json())
    return media


def asked(media: Path, run: Path | None, *kinds: str, **changes: Any) -> Any:
    """Return the options of a short run on speech, and on other media."""
    return media_runs.options(media, run, *kinds, data_speech=str(media / "audio"), **changes)


@pytest.fixture(scope="module")
def trained(media: Path, short: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run on videos and speech."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(asked(media, folder, "video"))
    return folder


def test_a_batch_of_speech_has_marks_behind_its_text(media: Path) -> None:
    with opened(asked(media, None, batch=3, mix="text=0,speech=1"), None) as run:
        assert run.mix is not None
        batch = run.mix.batch(4)
        targets, codec = batch.targets, run.mix.reader.codec
        items = {item.text: item for item in run.mix._folders["speech"].train}
    assert targets is not None and targets.tokens_BN is not None
    assert targets.taught_BT is not None and targets.spoken_BT is not None
    frames = targets.tokens_BN.shape[1]
    marks = spoken_marks(frames)
    assert marks[1:] == list(range(-(-frames // SPOKEN_STRIDE)))
    for b in range(3):
        text = bytes(batch.ids_BT[b][targets.taught_BT[b]].tolist())
        row = batch.ids_BT[b].tolist()
        # The text begins the row, as a prompt does.
        assert row[: len(text) + len(marks)] == [*text, *marks]
        exact(targets.spoken_BT[b].nonzero()[:, 0], len(text) + torch.arange(1, len(marks)))
        own = codec.tokens(whole_frames(read_audio(items[text].path))[None])[0]
        exact(targets.tokens_BN[b, : len(own)], own)
        assert targets.tokens_BN[b, len(own) :].eq(NO_TOKEN).all()


def test_one_folder_may_be_heard_and_spoken(media: Path) -> None:
    """What is known of a file as speech, which is only that it can be decoded, is not taken for what a sound needs."""
    asked_of = asked(media, None, "audio", batch=2, mix="text=0,audio=1,speech=1")
    with opened(asked_of, None) as run:
        assert run.mix is not None
        kinds = {run.mix.batch(number).kind for number in range(8)}
    assert kinds == {"audio", "speech"}


def test_tokens_that_are_dropped_are_made_again(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of speech may be larger than memory. Each sound is in a group of its own here, and one group is kept."""
    with opened(asked(media, None, mix="text=0,speech=1"), None) as run:
        assert run.mix is not None
        reader, items = run.mix.reader, run.mix._folders["speech"].train
        want = [reader.feature("speech", item) for item in items]
        again = MediaReader(reader.encoders, side=reader.side)
        again.codec, again.speech = reader.codec, reader.speech
        monkeypatch.setattr(media_reader, "TOGETHER", 1)
        monkeypatch.setattr(media_reader, "GROUPS_KEPT", 2)
        for _ in range(2):
            for item, tokens_N in zip(items, want, strict=True):
                exact(again.feature("speech", item), tokens_N)
                assert len(again._tokens) <= 2


def test_neighbours_become_tokens_in_one_pass(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are held out too."""
    sizes = []

    def counted(codec: AudioCodec, clips: list[Tensor]) -> list[Tensor]:
        sizes.append(len(clips))
        return tokens_of(codec, clips)

    monkeypatch.setattr(media_reader, "TOGETHER", 5)
    monkeypatch.setattr(media_reader, "tokens_of", counted)
    with opened(asked(media, None), None) as run:
        assert run.mix is not None
        folder = run.mix._folders["speech"]
        items = (*folder.train, *folder.validation)
        for item in items:
            run.mix.reader.feature("speech", item)
    assert folder.validation and len(items) == 12 and sizes == [5, 5, 2]


def test_a_sound_that_is_too_short_is_left_out_and_named_once(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(media / "audio", tmp_path / "audio")
    media_runs.save_sound(folder / "04.wav", 200.0, 0.004)
    asked_of = media_runs.options(media, None, data_speech=str(folder))
    with opened(asked_of, Console(quiet=True)) as run:
        assert run.mix is not None
        assert len(run.mix.training_items("speech")) + len(run.mix.held_out_items("speech")) == 11
    said = "".join(capsys.readouterr().err.split())
    assert said.count("04.wav") == 1 and "04.wav':asoundhasshape(64,),butmustbemono" in said


def test_whether_a_file_can_be_decoded_is_found_out_once(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is short of something says nothing of a file."""
    reader, told = MediaReader(Encoders(), side=2), []
    one, other, third = load_media("audio", str(media / "audio")).train[:3]
    monkeypatch.setattr(reader, "warn", told.append)
    results: list[Exception | None] = [None, ValueError("no sound"), MachineError("no thread"), None]

    def feature(kind: str, item: Item) -> None:
        if (result := results.pop(0)) is not None:
            raise result

    monkeypatch.setattr(reader, "feature", feature)
    for _ in range(2):
        assert reader.is_readable("audio", one) and not reader.is_readable("audio", other)
    assert len(results) == 2 and told == [f"{str(other)!r}: no sound; the file is left out"]
    with pytest.raises(MachineError, match="no thread"):
        reader.is_readable("audio", third)
    assert reader.is_readable("audio", third) and not results and len(told) == 1


def test_a_codec_that_has_not_learned_is_not_read() -> None:
    with pytest.raises(RuntimeError, match=r"^codec was read, but"):
        MediaReader(Encoders(), side=2).codec.tokens(torch.zeros(1, 160))


def test_decoded_sounds_belong_to_their_reader(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader keeps the sounds that were asked for last, and leaves none to another reader."""
    decoded = []

    def counted(path: Path, **named: Any) -> Tensor:
        decoded.append(path)
        return read_audio(path, **named)

    monkeypatch.setattr(media_reader, "read_audio", counted)
    monkeypatch.setattr(media_reader, "CLIPS_KEPT", 2)
    a, b, c = load_media("audio", str(media / "audio")).train[:3]
    first, second = (MediaReader(Encoders(), side=2) for _ in range(2))
    for item in (a, b, a, c, a, b):
        exact(first.clip(item), read_audio(item.path))
    assert decoded == [a.path, b.path, c.path, b.path]
    second.clip(b)
    assert decoded[4:] == [b.path]


def test_a_run_says_how_the_talker_does(trained: Path) -> None:
    lines = list(read_metrics(trained / "metrics.jsonl"))
    assert "val_tokens" in lines[-1]["media"]["speech"]
    assert any("train_tokens" in line["media"].get("speech", {}) for line in lines)


def test_a_killed_run_ends_with_the_same_hash(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its codec is still there or has to be trained again."""
    short: dict[str, Any] = {"steps": 3, "eval_interval": 3, "save_interval": 1}
    whole = train(asked(media, tmp_path / "whole", **short))
    train_until_killed(2, asked(media, tmp_path / "killed", **short))
    shutil.copytree(tmp_path / "killed", tmp_path / "lost")
    (tmp_path / "lost" / CODEC_FILE).unlink()
    seeds: list[int] = []

    def counted(*given: Any, seed: int) -> AudioCodec:
        seeds.append(seed)
        return trained_codec(*given, seed=seed)

    monkeypatch.setattr(media_mix, "trained_codec", counted)
    for name in ("killed", "lost"):
        again = train(asked(media, tmp_path / name, resume=True, **short))
        assert len(seeds) == (name == "lost")
        assert again.summary["state_sha256"] == whole.summary["state_sha256"], name
        assert (tmp_path / name / CODEC_FILE).read_bytes() == (tmp_path / "whole" / CODEC_FILE).read_bytes()


def test_a_codec_of_other_sounds_is_refused(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    shutil.copy(trained / CODEC_FILE, path)
    with pytest.raises(Exception, match="trained on other sounds"):
        load_codec(path, CPU, sha256="0" * 64)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Exception, match="digest"):
        load_codec(path, CPU)
    with pytest.raises(Exception, match="another model"):
        load_codec(trained / "final.safetensors", CPU)


def test_answers_are_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is the frame of the drawn latent, a sound that of the tokens that are said."""
    monkeypatch.chdir(tmp_path)
    common = ["generate", "--run", str(trained), "--device", "cpu", "--prompt", "red number 3"]
    assert arb([*common, "--as", "video"]) == b"answer.png\n"
    assert arb([*common, "--as", "video", "--to", "a.mp4"]) == b"a.mp4\n"
    assert arb([*common, "--as", "audio", "--seconds", "0.3"]) == b"answer.wav\n"
    model = ArbModel.from_pretrained(trained, device="cpu")
    ids_1T = torch.tensor([list(b"red number 3")])
    frames = model.encoders.decoded(model.draw(ids_1T))[0]
    exact(read_image("answer.png"), frames[0])
    assert read_video("a.mp4").frames.shape == frames.shape
    clip = load_codec(trained / CODEC_FILE, CPU).speak(model.say(ids_1T, 30))[0]
    written = read_audio("answer.wav")
    assert len(written) == 30 * 160
    exact(written, sixteen_bits(clip))


@pytest.mark.parametrize("answer", ["text", "video", "audio"])
def test_the_router_decides(
    answer: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What the router of a run says is what is written, and --as is asked first."""
    monkeypatch.chdir(tmp_path)
    place = ["text", "video", "audio"].index(answer)
    scores = torch.full((1, 3), -1.0)
    scores[0, place] = 1.0
    router = type(ArbModel.from_pretrained(trained, device="cpu").router)
    monkeypatch.setattr(router, "forward", lambda self, x_BPD: scores)
    common = ["generate", "--run", str(trained), "--device", "cpu", "--prompt", "red", "--bytes", "2"]
    printed = arb(common)
    made = {"text": None, "video": "answer.png", "audio": "answer.wav"}[answer]
    if made is None:
        capfd.readouterr()
        assert arb([*common, "--to", "a.png"]) == printed
        assert "the router answers with a text, so 'a.png' is not written" in capfd.readouterr().err
        assert printed.startswith(b"red") and not list(tmp_path.iterdir())
    else:
        assert printed.decode().strip() == made and (tmp_path / made).is_file()
    assert arb([*common, "--as", "text"]).startswith(b"red")


def test_a_prompt_stands_behind_the_marks_of_its_media() -> None:
    """Without media a prompt that is shorter than a window is filled up in front."""
    image = {"image_BNF": torch.zeros(1, 4, 3)}
    assert prompt_ids(b"red", image, "cpu").tolist() == [[*lead_of(image), *b"red"]]
    assert prompt_ids(b"r", None, "cpu").tolist() == [list(first_window(b"r"))] != [list(b"r")]


def test_an_untaught_router_is_not_asked(trained: Path) -> None:
    model = ArbModel.from_pretrained(trained, device="cpu")
    ids_1T = prompt_ids(b"red", None, "cpu")
    assert chosen(model, {}, ids_1T, None) == "text"
    assert chosen(model, {"data_speech": "x"}, ids_1T, {"image_BNF": torch.zeros(1)}) == "text"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--as", "audio", "--temperature", "1"],
            "--temperature was given, but does nothing with --as audio",
        ),
        (["--as", "video", "--seconds", "1"], "--seconds was given, but does nothing with --as video"),
        (["--as", "text", "--to", "a.png"], "--to was given, but does nothing with --as text"),
        (["--as", "audio", "--sidecar", "video=x"], "--sidecar video=... was given, but does nothing"),
        (["--as", "video", "--to", "a.wav"], "must end in .png or .mp4"),
        (["--as", "audio", "--to", "a.mp3"], "must end in .wav"),
        (["--as", "audio", "--to", "none/a.wav"], "cannot be written"),
        (["--as", "video"], "'answer.png' exists"),
        (["--as", "audio", "--seconds", "0"], "seconds"),
    ],
)
def test_answers_that_are_refused(
    arguments: list[str],
    says: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answer.png").write_bytes(b"mine")
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--run", str(trained), "--device", "cpu", *arguments])
    assert end.value.code != 0
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (tmp_path / "answer.png").read_bytes() == b"mine"


def test_a_run_that_was_not_taught_refuses_to_answer_so(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(media_runs.options(media, folder, steps=1))
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--run", str(folder), "--device", "cpu", "--as", "audio"])
    assert end.value.code == 1 and "--data-speech teaches" in capsys.readouterr().err


def test_speech_needs_a_talker_of_as_many_codes(media: Path, tmp_path: Path) -> None:
    preset = tmp_path / "silent.json"
    preset.write_text(replace(CONFIG, talker_tokens=9).to_json())
    with pytest.raises(ValueError, match="talker_tokens is 9 and not 289: --enable-speech"):
        train(asked(media, None, preset=str(preset)))


def sixteen_bits(clip: Tensor) -> Tensor:
    """Return a sound as 16 bits hold it, which have no zero below 0."""
    return (clip * 2**15).round().clamp(max=2**15 - 1).to(torch.int16) / 2**15


def test_media_that_are_written_are_read_again(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 6, 10), generator=rng, dtype=torch.uint8)
    write_image(tmp_path / "a.png", image)
    exact(read_image(tmp_path / "a.png"), image)
    clip = torch.rand(1600, generator=rng) * 2 - 1
    write_audio(tmp_path / "a.wav", clip)
    exact(read_audio(tmp_path / "a.wav"), sixteen_bits(clip))
    write_audio(tmp_path / "again.wav", sixteen_bits(clip))
    exact(read_audio(tmp_path / "again.wav"), sixteen_bits(clip))
    frames = torch.full((3, 3, 16, 32), 200, dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", frames)
    got = read_video(tmp_path / "a.mp4")
    assert got.frames.shape == frames.shape and got.frames_per_second == 10
    assert (got.frames.int() - 200).abs().max() <= 3
    with pytest.raises(SidecarError, match="cannot be written"):
        write_image(tmp_path / "none" / "a.png", image)


@pytest.mark.parametrize(
    ("write", "medium", "says"),
    [
        (write_image, torch.zeros(3, 4, 4), "image has dtype float32"),
        (write_image, torch.zeros(4, 4, 3, dtype=torch.uint8), r"image has shape .* \[3, height, width\]"),
        (write_video, torch.zeros(2, 3, 5, 4, dtype=torch.uint8), "even sides"),
        (write_video, torch.zeros(3, 4, 4, dtype=torch.uint8), r"frames has shape .* \[frames, 3, "),
        (write_audio, torch.full((4,), 1.5), "clip has shape"),
        (write_audio, torch.full((4,), float("nan")), "clip has shape"),
        (write_audio, torch.zeros(0), "clip has shape"),
    ],
)
def test_media_that_are_not_written(write: Any, medium: torch.Tensor, says: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        write(tmp_path / "a", medium)
    assert not list(tmp_path.iterdir())
