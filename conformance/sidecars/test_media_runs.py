"""`arb train` on text, pictures, sounds and videos: what a batch is, that runs repeat to the bit, that captions are learned."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from arbitor import ArbModel
from arbitor.optimized import cli
from arbitor.optimized.training.checkpoint import load_checkpoint, state_sha256
from arbitor.optimized.training.errors import TrainingError
from arbitor.optimized.training.loop import opened, train
from arbitor.optimized.training.media import lead_of
from arbitor.optimized.training.media_losses import Means
from arbitor.optimized.training.media_mix import CACHE_FOLDER, Mix
from arbitor.optimized.training.metrics import read_metrics
from arbitor.optimized.training.options import TrainOptions
from arbitor.reference.config import SPECIAL_IDS, with_fields
from arbitor.sidecars import AudioSidecar, SidecarError, read_audio, read_image, read_video
from arbitor.sidecars.encoders import first_frame
from conformance.compare import exact
from conformance.sidecars.media_runs import (
    CONFIG,
    KINDS,
    PATCHES,
    arb,
    assert_captions_are_read,
    options,
    outcome,
    save_sound,
    save_video,
)
from conformance.training.runs import train_until_killed

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture
def mix(media: Path, cache: str) -> Iterator[Mix]:
    """Return the mix of a run on all kinds."""
    asked = options(media, None, *KINDS, feature_cache=cache, batch=3)
    with opened(asked, None) as run:
        assert run.mix is not None
        yield run.mix


def test_a_batch_is_of_one_kind_and_has_its_media_before_its_text(mix: Mix) -> None:
    pad = SPECIAL_IDS["PAD"]
    seen = {}
    for micro_step in range(40):
        batch = mix.batch(micro_step)
        again = mix.batch(micro_step)
        exact(again.ids_BT, batch.ids_BT)
        seen[batch.kind] = batch
        assert batch.targets is not None and batch.targets.modality_B is not None
        assert batch.targets.modality_B.tolist() == [1 if batch.kind == "video" else 0] * 3
    assert seen.keys() == {"text", *KINDS}
    assert not seen["text"].media and seen["text"].targets.taught_BT is None
    assert seen["text"].ids_BT.shape == (3, 24) and seen["text"].taught_bytes() == 63
    assert seen["image"].media["image_BNF"].shape == (3, PATCHES, 48)
    assert seen["audio"].media["audio_BNF"].shape[2] == 48 and not seen["video"].media
    assert seen["video"].targets.latent.shape == (3, 16, 1, 2, 2)
    for kind in KINDS:
        batch = seen[kind]
        # A text that a latent answers is read as a prompt is.
        lead = lead_of(batch.media) if batch.media else []
        assert batch.ids_BT.shape[1] <= 24
        assert batch.taught_bytes() == int(batch.targets.taught_BT[:, 3:].sum()) < batch.ids_BT.numel()
        for row, taught in zip(batch.ids_BT.tolist(), batch.targets.taught_BT.tolist(), strict=True):
            text = bytes(row[place] for place in range(len(row)) if taught[place])
            filling = len(row) - len(lead) - len(text)
            assert row == lead + list(text) + [pad] * filling and len(text) > 0
            colour, number = text.split(b" number ")
            assert colour in (b"red", b"green", b"blue") and number.endswith(b"\n") == (kind != "video")


def test_a_batch_is_what_the_files_hold(mix: Mix) -> None:
    """Features and latents of a batch are those of the files of its texts, made by hand."""
    checked = set()
    for micro_step in range(30):
        batch = mix.batch(micro_step)
        if batch.kind not in ("image", "video") or batch.kind in checked:
            continue
        checked.add(batch.kind)
        assert batch.targets is not None and batch.targets.taught_BT is not None
        items = {item.text: item.path for item in mix._folders[batch.kind].train}
        for b in range(3):
            text = bytes(batch.ids_BT[b][batch.targets.taught_BT[b]].tolist()).strip()
            if batch.kind == "image":
                want = mix.encoders.sidecar("vision")([read_image(items[text])])[0]
                exact(batch.media["image_BNF"][b], want)
            else:
                frame = first_frame(read_video(items[text]).frames, 16)
                assert batch.targets.latent is not None
                exact(batch.targets.latent[b], mix.encoders.sidecar("video").encode(frame[None])[0])
    assert checked == {"image", "video"}


def test_captions_of_three_bytes_teach_what_answers_them(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No byte of them is predicted, so they have no bits, which the run says once. They have a latent."""
    folder = shutil.copytree(media / "video", tmp_path / "video")
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(("cat", "ox")[number % 2])
    asked = options(media, tmp_path / "run", "video", data_video=str(folder), mix="text=0,video=1", steps=2)
    summary = train(asked, console=Console(quiet=True)).summary
    sentence = "arb: of video that is held out no byte is predicted: the run has no val_bpb, and keeps no best model.\n"
    assert (
        capsys.readouterr().err.count(sentence) == 1 and not (tmp_path / "run" / "best.safetensors").exists()
    )
    assert summary["skipped"] == 0 and summary["val_bpb"] is None
    assert summary["media"]["video"]["val_bpb"] is None
    assert summary["media"]["video"]["val_latent"] > 0


def test_code_is_a_text_of_its_own(media: Path, tmp_path: Path) -> None:
    """Its batches are windows of its file, it is measured on windows of it that are held out, and other code is refused."""
    code, folder = tmp_path / "code.txt", tmp_path / "run"
    code.write_bytes(b"".join(b"x%d = f(x%d)\n" % (i, i - 1) for i in range(200)))
    sources = {"text": (media / "text.txt").read_bytes(), "code": code.read_bytes()}
    asked = {"data_code": str(code), "mix": "text=1,code=3", "steps": 2}
    with opened(options(media, None, **asked), None) as run:
        assert run.mix is not None
        [said] = [line for line in run.mix.first_lines() if line.startswith("code: ")]
        assert f"{len(sources['code']):,} bytes" in said and "validation" in said
        seen = [run.mix.batch(micro_step) for micro_step in range(20)]
        assert {batch.kind for batch in seen} == sources.keys()
        for batch in seen:
            assert all(bytes(row) in sources[batch.kind] for row in batch.ids_BT.tolist())
        # Windows of the text that are given are not those of the code.
        mean = run.mix.validate(run.model, run.text.windows_WT)
        of_code, of_text = (run.mix.validated[kind] for kind in ("code", "text"))
        assert mean == pytest.approx((of_text["val_bpb"] + 3 * of_code["val_bpb"]) / 4)
        run.mix.validate(run.model, run.text.windows_WT[:1])
        assert run.mix.validated["code"] == of_code != run.mix.validated["text"]
    train_until_killed(1, options(media, folder, **asked))
    assert not (folder / CACHE_FOLDER).exists()
    code.write_bytes(sources["code"].replace(b"f", b"g"))
    with pytest.raises(TrainingError, match="started with data for code"):
        train(TrainOptions(run=folder, resume=True))


def test_micro_batches_of_several_kinds_are_summed(media: Path, cache: str) -> None:
    """A step of six, written out: micro-batches of pictures add to the sums of the weights that texts reach, too."""
    asked = options(media, None, "image", feature_cache=cache, accum=6, steps=1, save=False)
    with opened(asked, None) as run:
        assert run.mix is not None
        batches = [run.mix.batch(micro_step) for micro_step in range(6)]
        plain = ArbModel(run.model.config, device="cpu", seed=run.settings.seed)
        for micro_step, batch in enumerate(batches):
            losses = plain.losses(**batch.share(run.world).on(plain.device))
            plain.backward(losses, rate=run._rate(0), step=micro_step, accum=6)
        plain.step()
    assert {batch.kind for batch in batches} == {"text", "image"}
    assert train(asked).summary["state_sha256"] == state_sha256(plain.state())


def test_kinds_come_as_often_as_the_mix_says(media: Path, cache: str) -> None:
    asked = options(media, None, "image", feature_cache=cache, mix="text=1,image=3")
    with opened(asked, None) as run:
        assert run.mix is not None
        kinds = [run.mix._drawn(step)[0] for step in range(1000)]
    # 750 expected, with a deviation of 14.
    assert 690 < kinds.count("image") < 810


def test_a_router_learns_nothing_where_texts_are_all_that_is_answered(media: Path, cache: str) -> None:
    with opened(options(media, None, "image", "audio", feature_cache=cache), None) as run:
        assert run.mix is not None and run.model.config.router_inner
        batches = {batch.kind: batch for batch in map(run.mix.batch, range(20))}
    assert batches.keys() == {"text", "image", "audio"} and batches["text"].targets is None
    for kind in ("image", "audio"):
        targets = batches[kind].targets
        assert targets is not None and targets.modality_B is None


def test_a_line_of_metrics_has_what_came_since_the_last_one(media: Path, cache: str) -> None:
    """Losses and ids of the passes, and the validation of its own step alone."""
    with opened(options(media, None, "image", feature_cache=cache), None) as run:
        mix = run.mix
        assert mix is not None
        mix.validate(run.model, run.text.windows_WT)
        for first in (0, 2):
            batches = [mix.batch(first + number) for number in range(2)]
            nats = [run._take_pass(1.0, first + number) for number in range(2)]
            found, ids, mix.ids_taken = mix.metrics(validated=False), mix.ids_taken, 0
            assert ids == sum(batch.ids_BT.numel() for batch in batches)
            assert found.keys() == {batch.kind for batch in batches}
            for kind, numbers in found.items():
                places = [place for place in range(2) if batches[place].kind == kind]
                taught = [batches[place].taught_bytes() for place in places]
                total = sum(nats[place] * count for place, count in zip(places, taught, strict=True))
                assert numbers == {"train_bpb": pytest.approx(total / sum(taught) / math.log(2))}
        assert mix.metrics(validated=False) == {} and mix.metrics(validated=True) == mix.validated


def test_bits_per_byte_of_a_kind_are_a_mean_over_its_bytes() -> None:
    """A micro-batch of short captions counts less than one of long captions, and not at all where no byte is predicted."""

    def batch(samples: int, taught: int) -> Any:
        return SimpleNamespace(ids_BT=range(samples), taught_bytes=lambda: taught)

    means = Means()
    for mean, taught in ((1.0, 30), (4.0, 10), (0.0, 0)):
        means.add(batch(2, taught), {"bytes": mean})
    mix: Any = SimpleNamespace(validated={}, _seen={"image": means})
    assert Mix.metrics(mix, validated=False) == {"image": {"train_bpb": pytest.approx(1.75 / math.log(2))}}
    means = mix._seen["image"] = Means()
    means.add(batch(1, 0), {"bytes": 0.0, "route": 0.5})
    # In two parts.
    means.add(batch(3, 0), {"bytes": 0.0, "route": 0.25}, {"bytes": 0.0, "route": 0.75})
    assert Mix.metrics(mix, validated=False) == {"image": {"train_bpb": None, "train_route": 0.875}}


def test_killed_and_resumed_ends_the_same(media: Path, tmp_path: Path) -> None:
    """With every kind, also without the features that the first process kept, and with files in archives, under other names."""
    train(options(media, tmp_path / "whole", *KINDS))
    want = outcome(tmp_path / "whole")
    assert want[1].keys() == {"text", *KINDS} and want[1]["video"].keys() == {
        "val_bpb",
        "val_route",
        "val_latent",
    }
    moved = tmp_path / "moved"
    for kind in KINDS:
        (moved / kind).mkdir(parents=True)
        with tarfile.open(moved / kind / "all.tar", "w") as tar:
            for path in sorted((media / kind).iterdir()):
                tar.add(path, f"renamed-{path.name}")
    folder = tmp_path / "killed"
    train_until_killed(3, options(media, folder, *KINDS))
    shutil.rmtree(folder / "features")
    train(TrainOptions(run=folder, resume=True, **{f"data_{kind}": str(moved / kind) for kind in KINDS}))
    assert outcome(folder) == want
    lines = read_metrics(folder / "metrics.jsonl")
    kinds = {kind for line in lines for kind in line["media"]}
    assert kinds == {"text", *KINDS}
    assert any("train_latent" in line["media"].get("video", {}) for line in lines)


def test_one_kind_alone_goes_on_the_same(media: Path, tmp_path: Path) -> None:
    """A run of pictures alone learns no text, has no experts, and is resumed without the name of its kind."""
    folder = tmp_path / "run"
    train_until_killed(3, options(media, folder, "image", only="vision"))
    result = train(TrainOptions(run=folder, resume=True))
    assert set(result.summary["media"]) == {"image"}
    document = json.loads((folder / "config.json").read_text())
    assert not document["model"]["use_moe"] and document["run"]["only"] == "vision"
    with pytest.raises(TrainingError, match="started with only vision and cannot go on with only audio"):
        train(TrainOptions(run=folder, resume=True, only="audio"))


def test_a_text_model_grows_eyes_and_ends_the_same_when_killed(media: Path, tmp_path: Path) -> None:
    """A run on text alone goes on with pictures: its model begins with every old byte, edges and votes too."""
    blind = with_fields(CONFIG, image_features=0)
    (tmp_path / "blind.json").write_text(blind.to_json())
    source = tmp_path / "source"
    train(options(media, source, preset=str(tmp_path / "blind.json")))
    before = load_checkpoint(source / "best.safetensors").state
    for name, step in (("whole", None), ("killed", 3)):
        asked = options(media, tmp_path / name, "image", init_from=str(source), keep_votes=True)
        if step is None:
            train(asked)
            continue
        train_until_killed(step, asked)
        train(TrainOptions(run=tmp_path / name, resume=True))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    began = json.loads((tmp_path / "whole" / "config.json").read_text())["beginning"]
    assert set(began["kept"]) | set(began["moved"]) == set(before) and began["left_out"] == []
    assert "graph.edges.neighbours" in began["moved"]
    fresh = {name.split(".")[0] for name in began["fresh"]}
    assert fresh == {"image_sequencer", "shared_vq"}


def test_other_data_and_other_sidecars_are_refused(media: Path, checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_until_killed(1, options(media, folder, "image", cuda_graph=False))
    other = tmp_path / "other"
    shutil.copytree(media / "image", other)
    (other / "00.txt").write_text("another text")
    with pytest.raises(TrainingError, match="started with data for image"):
        train(TrainOptions(run=folder, resume=True, data_image=str(other)))
    vision = tmp_path / "dinov2"
    shutil.copytree(checkpoints / "dinov2", vision)
    with pytest.raises(TrainingError, match="started with a sidecar for vision"):
        train(TrainOptions(run=folder, resume=True, vision=str(vision)))
    with pytest.raises(TrainingError, match="started with mix None"):
        train(TrainOptions(run=folder, resume=True, mix="text=1,image=2"))


def test_a_run_of_one_text_is_no_mix_and_takes_no_pictures_later(media: Path, tmp_path: Path) -> None:
    """Its passes are those of `Passes`, which may be recorded."""
    folder = tmp_path / "run"
    with opened(options(media, None), None) as run:
        assert run.mix is None
    train_until_killed(1, options(media, folder))
    pictures = {"data_image": str(media / "image"), "vision": str(media / "dinov2")}
    with pytest.raises(TrainingError, match="started with data for image that is 'none', and cannot go on"):
        train(TrainOptions(run=folder, resume=True, **pictures))


def test_only_sidecars_of_kinds_in_the_mix_are_built(
    media: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a sidecar was loaded that nobody needs")

    monkeypatch.setattr(AudioSidecar, "load", refuse)
    train(options(media, None, "image", feature_cache=cache, steps=1))


def test_a_file_that_cannot_be_decoded_is_left_out_and_named(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "image"
    shutil.copytree(media / "image", folder)
    for name in ("01.png", "02.png"):
        (folder / name).write_bytes(b"no picture " + name.encode())
    asked = options(media, None, "image", data_image=str(folder), steps=8, mix="text=0,image=1")
    with opened(asked, Console(quiet=True)) as run:
        assert run.mix is not None
        texts = {bytes(row[row < 256].tolist()) for step in range(30) for row in run.mix.batch(step).ids_BT}
    assert not any(b"number 1\n" in text or b"number 2\n" in text for text in texts) and len(texts) > 3
    said = capsys.readouterr().err
    assert said.count("is left out") <= 2 and "cannot be decoded" in said
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture " + path.name.encode())
    with pytest.raises(TrainingError, match="has no file of image that can be decoded"):
        train(options(media, None, "image", data_image=str(folder), mix="text=0,image=1"))


def test_a_missing_library_is_no_fault_of_the_files(
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first file ends the run, where every file was left out."""
    # Nothing is imported from here once it stands as absent.
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SidecarError, match=r"av needs the package 'av', .*pip install 'arbitor\[media\]'"):
        train(options(media, None, "audio", mix="text=0,audio=1"))
    assert "left out" not in capsys.readouterr().err


def test_a_shortage_of_the_machine_is_no_fault_of_the_files(
    media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is left out once is left out to the end, so that the run would not be that of its settings."""
    import av

    def refuse(*_: Any, **more: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "no thread can be started")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(SidecarError, match=r"cannot be decoded .*no thread can be started"):
        train(options(media, None, "audio", mix="text=0,audio=1"))
    assert "left out" not in capsys.readouterr().err


def save_small_video(path: Path, number: int) -> None:
    save_video(path, "red", number, side=4)


def save_nothing(path: Path, number: int) -> None:
    """Write a sound of so few samples that it would be filled up to a second of silence."""
    save_sound(path, 200.0 + number, number / 1000)


@pytest.mark.parametrize(
    ("kind", "suffix", "write", "says"),
    [
        ("video", ".mkv", save_small_video, "04.mkv': frames has shape"),
        ("audio", ".wav", save_nothing, "04.wav': a sound has shape (64,), but must be mono"),
    ],
)
def test_a_medium_that_is_too_small_is_left_out_and_named(
    media: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    suffix: str,
    write: Callable[[Path, int], None],
    says: str,
) -> None:
    folder = shutil.copytree(media / kind, tmp_path / kind)
    for number in range(6):
        write(folder / f"{number:02d}{suffix}", number)
    with opened(options(media, None, kind, **{f"data_{kind}": str(folder)}), Console(quiet=True)) as run:
        assert run.mix is not None
        assert len(run.mix.training_items(kind)) + len(run.mix.held_out_items(kind)) == 6
    said = capsys.readouterr().err
    assert said.count(says) == 1 and "left out" in said


@pytest.mark.parametrize(
    ("kinds", "changes", "says"),
    [
        (("image",), {"preset": "small"}, "whose image_features is 0: --enable-image switches it on"),
        (("audio",), {"preset": "small"}, "whose audio_features is 0: --enable-audio switches it on"),
        (("video",), {"preset": "small"}, "whose video_latent is 0: --enable-video switches it on"),
        (("image",), {"preset": "small", "enable_image": True}, "gives 48 features, but must give 384"),
        (("image",), {"cuda_graph": True}, "cuda_graph is True, but must be False or None for a mix"),
    ],
)
def test_what_the_model_or_the_passes_cannot_do(
    media: Path, kinds: tuple[str, ...], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        train(options(media, None, *kinds, **changes))


def test_a_latent_that_is_no_frame_is_refused(media: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.json").write_text(with_fields(CONFIG, video_latent=60).to_json())
    with pytest.raises(ValueError, match=r"^data_video is '.*its video_latent, 60, is no 16 s\^2"):
        train(options(media, None, "video", preset=str(tmp_path / "flat.json")))


def test_a_folder_of_features_that_cannot_be_made_is_named(media: Path) -> None:
    file = str(media / "text.txt")
    with pytest.raises(TrainingError, match=f"^cannot use the folder of features '{file}': "):
        train(options(media, None, "image", feature_cache=file))


def test_captions_are_read_from_the_pictures(media: Path, cache: str) -> None:
    """After some steps the words are likelier after their own picture than after another one."""
    asked = options(
        media,
        None,
        "image",
        feature_cache=cache,
        steps=40,
        batch=12,
        mix="text=0,image=1",
        eval_interval=1000,
        disable_vq=True,
    )
    with opened(asked, None) as run:
        run.take_steps()
        assert_captions_are_read(run)


@pytest.fixture(scope="module")
def trained(media: Path, short: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run on pictures and sounds."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(options(media, folder, "image", "audio", steps=2))
    return folder


def test_a_run_brings_its_encoders_along(trained: Path, media: Path) -> None:
    """`arb generate --image` and `ArbModel.from_pretrained` give the same text after the same media."""
    model = ArbModel.from_pretrained(trained, device="cpu")
    picture, sound = media / "image" / "03.png", media / "audio" / "02.wav"
    want = model.generate(b"red", images=[read_image(picture)], temperature=0, stop=b"\n", max_new_bytes=6)
    common = ["generate", "--run", str(trained), "--temperature", "0", "--bytes", "6", "--device", "cpu"]
    assert arb([*common, "--prompt", "red", "--image", str(picture)]) == b"red" + want
    heard = model.generate(b"", sounds=[read_audio(sound)], temperature=0, stop=b"\n", max_new_bytes=6)
    assert arb([*common, "--audio", str(sound)]) == heard
    video = media / "video" / "01.mkv"
    frames = model.generate(b"", clips=[read_video(video).frames], temperature=0, stop=b"\n", max_new_bytes=6)
    assert arb([*common, "--video", str(video)]) == frames


def test_the_command_says_how_it_does_on_each_kind(media: Path, cache: str) -> None:
    """`arb train --data-text` is `--data`, and the table at the end has a line for each kind of the mix."""
    files = {
        "--preset": "preset.json",
        "--data-text": "text.txt",
        "--data-image": "image",
        "--vision": "dinov2",
    }
    named = [word for option, name in files.items() for word in (option, str(media / name))]
    sizes = [
        "--mix",
        "text=1,image=2",
        "--steps",
        "1",
        "--batch",
        "2",
        "--context",
        "24",
        "--device",
        "cpu",
        "--no-save",
    ]
    said = arb(["train", *named, *sizes, "--feature-cache", cache]).decode()
    assert "mix: text 33.3%, image 66.7% of the micro-batches" in said
    assert "image: 12 with text, 1 of them held out" in said
    assert "on text" in said and "on image" in said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--image", "PICTURE", "--video", "VIDEO"], 2, "images and clips are given"),
        (["--image", "gone.png"], 1, "'gone.png' is no file that exists"),
        (["--audio", "PICTURE"], 1, "is no sound or video of a format that is read"),
        (["--audio", "VIDEO"], 1, "has no sound"),
        (["--sidecar", "vision=x"], 2, "does nothing without --image or --video"),
        (["--image", "PICTURE", "--sidecar", "smell=x"], 2, "must be KIND=SOURCE"),
        (["--image", "PICTURE", "--sidecar", "vision=no_such"], 1, "source is 'no_such'"),
        (["--image", "PICTURE", "--bytes", "0"], 2, "does nothing with --bytes 0"),
    ],
)
def test_media_that_no_prompt_can_have(
    trained: Path,
    media: Path,
    capsys: pytest.CaptureFixture[bytes],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    files = {"PICTURE": str(media / "image" / "00.png"), "VIDEO": str(media / "video" / "00.mkv")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["generate", "--run", str(trained), "--device", "cpu", *(files.get(a, a) for a in arguments)]
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == code and said.startswith("arb: ") and says in said


def test_another_sidecar_than_the_trained_one_is_told(
    trained: Path, media: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ["--image", str(media / "image" / "00.png"), "--sidecar", f"vision={checkpoints / 'dinov2'}"]
    arb(["generate", "--run", str(trained), "--device", "cpu", "--bytes", "1", *picture])
    assert "the vision sidecar is not the one that the run was trained with" in capsys.readouterr().err
