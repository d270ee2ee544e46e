"""The codec makes tokens of sound that tell its spectrum, and sound of tokens; the talker says tokens at marks behind a text.

Legend: B sounds, T samples, F frames of 160 samples, S = 161 bins.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arbitor.reference import ops as reference_ops
from arbitor.reference.config import with_modules
from arbitor.reference.graph import ArbModel, Targets
from arbitor.reference.graph.audio import AUDIO_CODES
from arbitor.reference.graph.codec import BINS, FLOOR, SPECTRUM_UNIT, WINDOW, AudioCodec, sound_of, spectra
from arbitor.reference.graph.talker import SPOKEN_STRIDE, spoken_marks
from arbitor.reference.graph.targets import spoken_streams
from conformance.compare import alike, exact
from conformance.graph import models
from conformance.subject import Subject

SPEAKS = replace(models.WHOLE, talker_tokens=AUDIO_CODES)


def tones(*hertz: float, frames: int = 20) -> Tensor:
    """Return tones that are neither silent nor at full scale, float32 [B, 160 F]."""
    time_T = torch.arange(frames * 160) / 16_000
    return torch.stack([0.5 * torch.sin(2 * math.pi * h * time_T) for h in hertz])


def codec(seed: int = 3) -> AudioCodec:
    return AudioCodec(models.NANO, seed=seed)


def test_spectra_by_hand() -> None:
    """A discrete Fourier transform, sum by sum, of windows whose middles are those of the frames."""
    audio_BT = torch.randn(1, 480, generator=torch.Generator().manual_seed(0))
    got_BFS = spectra(audio_BT)
    assert got_BFS.shape == (1, 3, BINS) and got_BFS.dtype == torch.float32
    padded = F.pad(audio_BT[0].double(), (80, 80))
    n_W = torch.arange(WINDOW, dtype=torch.float64)
    hann_W = 0.5 - 0.5 * torch.cos(2 * math.pi * n_W / WINDOW)
    for frame in range(3):
        window_W = padded[160 * frame :][:WINDOW] * hann_W
        for k in (0, 7, 160):
            turns_W = 2 * math.pi * k * n_W / WINDOW
            size = math.hypot(
                float((window_W * turns_W.cos()).sum()), float((window_W * turns_W.sin()).sum())
            )
            assert got_BFS[0, frame, k].item() == pytest.approx((math.log(size + FLOOR) + 1) / 2, abs=1e-5)


def test_sound_of_spectra_has_these_spectra() -> None:
    """Of tones the error is small beside that of silence, the sound is as long as its frames, and nothing is drawn."""
    want_BFS = spectra(tones(300.0, 1250.0))
    sound_BT = sound_of(want_BFS)
    assert sound_BT.shape == (2, 3200) and sound_BT.abs().max() <= 1
    exact(sound_BT, sound_of(want_BFS))
    error = (spectra(sound_BT) - want_BFS).square().mean()
    assert error < 0.1 * (spectra(torch.zeros(2, 3200)) - want_BFS).square().mean()
    # The pitch is that of the tones: the loudest bin of each, 50 Hz wide.
    exact(spectra(sound_BT)[:, 10].argmax(dim=-1), torch.tensor([6, 25]))


def test_losses_by_hand() -> None:
    made, audio_BT = codec(), tones(200.0, 700.0, frames=4)
    losses = {name: value.detach() for name, value in made.losses(audio_BT).items()}
    with torch.no_grad():
        code_BFC, ids_BF, of_codes = made.encoder.coded(audio_BT)
        error = made.decoder(code_BFC).double() - spectra(audio_BT)
        logits_BFV = made.encoder.encode(audio_BT)[0].double()
    assert losses.keys() == {"spectrum", "next", "commitment", "codebook"}
    alike(losses["spectrum"], error.square().mean())
    nats = [-F.log_softmax(logits_BFV[b, f], 0)[ids_BF[b, f + 1]] for b in range(2) for f in range(3)]
    alike(losses["next"], torch.stack(nats).mean())
    for name, value in of_codes.items():
        alike(losses[name], value)


@pytest.mark.parametrize(
    ("name", "movers"),
    [
        ("spectrum", {"encoder.first", "encoder.second", "encoder.project", "decoder"}),
        ("next", {"encoder.out"}),
        ("codebook", {"encoder.codebook"}),
        ("commitment", {"encoder.first", "encoder.second", "encoder.project"}),
    ],
)
def test_what_each_loss_moves(name: str, movers: set[str]) -> None:
    """The guess at the next token moves its own matrix alone, so that the encoder does not make its tokens easy to guess."""
    made = codec()
    losses = made.losses(tones(200.0, 700.0))
    with made.voting.taking(rate=1.0, step=0):
        losses[name].backward()
    voted = {n for n, module in made.ternary_modules().items() if module.weight.trit_accum.any()}
    assert voted == movers


def test_the_codec_learns_tones() -> None:
    """The loss falls, and the codes that were learned tell tones apart better than those that a codec starts with."""
    pool, num_steps = (250.0, 1000.0, 3000.0, 6000.0), 40
    learned_BT, held_BT = tones(*pool), tones(*pool, frames=9)
    want_BFS = spectra(held_BT)
    mean_error = (want_BFS - spectra(learned_BT).mean(dim=(0, 1))).square().mean()

    def errors(made: AudioCodec) -> tuple[float, float]:
        """Return the errors of the spectra of tokens, and of those of the sound that is made of them, over that of the mean."""
        made.tabulate([learned_BT[:2], learned_BT[2:]])
        tokens_BF = made.tokens(held_BT)
        said = made.spectra_of(tokens_BF), spectra(made.speak(tokens_BF))
        of_tokens, of_sound = (float((each - want_BFS).square().mean() / mean_error) for each in said)
        return of_tokens, of_sound

    made, first = codec(), 0.0
    for step in range(num_steps):
        drawn = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(step)).tolist()
        audio_BT = tones(*(pool[place] for place in drawn), frames=8)
        error = made.learn(audio_BT, rate=3.0 * (1 - step / num_steps), step=step)["spectrum"]
        first = first or error
    assert error < first / 3
    learned, start = errors(made), errors(codec())
    assert learned[0] < start[0] / 2 and learned[1] < min(start[1], 0.2), (learned, start)


def test_the_table_is_the_mean_of_the_frames_of_each_token() -> None:
    made, clips = codec(), [tones(250.0), tones(900.0, 1500.0, frames=7)]
    made.tabulate(clips)
    frames_RS = torch.cat([spectra(clip).flatten(0, 1) for clip in clips]).double()
    ids_R = torch.cat([made.tokens(clip).flatten() for clip in clips])
    for token in ids_R.unique().tolist():
        want_S = (frames_RS[ids_R == token].mean(dim=0) * SPECTRUM_UNIT).round().to(torch.int16)
        exact(made.spoken.spectra[token], want_S)
    unused = next(token for token in range(AUDIO_CODES) if token not in ids_R)
    with torch.no_grad():
        decoded_S = made.decoder(made.encoder.codebook(torch.tensor([unused])))[0].double()
    exact(made.spoken.spectra[unused], (decoded_S * SPECTRUM_UNIT).round().to(torch.int16))
    exact(made.spectra_of(torch.tensor([[unused]])), made.spoken.spectra[unused][None, None] / SPECTRUM_UNIT)


def test_a_codec_is_saved_whole() -> None:
    made, other = codec(), codec(seed=4)
    made.learn(tones(300.0), rate=4.0, step=0)
    made.tabulate([tones(300.0)])
    other.load_state(made.state())
    audio_BT = tones(310.0)
    exact(other.speak(other.tokens(audio_BT)), made.speak(made.tokens(audio_BT)))


def test_both_op_sets_hear_and_say_the_same(subject: Subject) -> None:
    """Losses are alike, and tokens and the table that follows from them are equal."""
    audio_BT, results = tones(300.0, 1250.0, frames=3), []
    for ops, device in (
        (reference_ops, torch.device("cpu")),
        (models.drawn_by_the_reference(subject.ops), subject.device),
    ):
        made = AudioCodec(models.NANO, ops=ops, device=device, seed=3)
        losses = {name: value.detach().cpu() for name, value in made.losses(audio_BT.to(device)).items()}
        made.tabulate([audio_BT.to(device)])
        results.append((losses, made.tokens(audio_BT.to(device)).cpu(), made.spoken.spectra.cpu()))
    for name, value in results[0][0].items():
        alike(results[1][0][name], value, name)
    exact(results[1][1], results[0][1])
    assert (results[1][2].int() - results[0][2].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda made: made.losses(torch.zeros(1, 160)), ValueError, "audio_BT has shape"),
        (lambda made: made.losses(torch.zeros(1, 500)), ValueError, "multiple of 160"),
        (lambda made: made.losses(torch.zeros(320)), ValueError, "audio_BT has shape"),
        (lambda made: made.losses(torch.zeros(1, 320, dtype=torch.int64)), TypeError, "audio_BT has dtype"),
        (lambda made: made.tabulate([torch.zeros(1, 10)]), ValueError, "audio_BT has shape"),
        (lambda made: made.speak(torch.zeros(1, 2)), TypeError, "tokens_BF has dtype float32"),
        (lambda made: made.speak(torch.tensor([[289]])), ValueError, "tokens_BF holds 289"),
        (lambda made: made.speak(torch.tensor([3])), ValueError, "tokens_BF has shape"),
    ],
)
def test_refusals_of_the_codec(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(codec())


def test_marks_tell_their_time() -> None:
    assert spoken_marks(1)[1:] == [0] and spoken_marks(SPOKEN_STRIDE + 1)[1:] == [0, 1]
    long = spoken_marks(SPOKEN_STRIDE * 258)[1:]
    assert len(long) == 258 and long[255:] == [255, 0, 1]


def marked(frames: int) -> tuple[Tensor, Targets]:
    """Return two texts of unequal length with marks behind, filled up, and what they teach."""
    texts, marks = [b"abcdefg", b"hijk"], spoken_marks(frames)
    longest = max(map(len, texts)) + len(marks)
    rows = [[*text, *marks] for text in texts]
    ids_BT = torch.tensor([row + [256] * (longest - len(row)) for row in rows])
    place_T, ends_B1 = torch.arange(longest), torch.tensor([[len(text)] for text in texts])
    spoken_BT = (place_T > ends_B1) & (place_T < ends_B1 + len(marks))
    tokens_BN = torch.randint(0, AUDIO_CODES, (2, frames), generator=torch.Generator().manual_seed(1))
    return ids_BT, Targets(tokens_BN=tokens_BN, taught_BT=place_T < ends_B1, spoken_BT=spoken_BT)


def test_tokens_are_taught_at_the_marks() -> None:
    """By hand: token n of a sequence by its mark n // 5, and the same as without the filling behind."""
    model, frames = ArbModel(SPEAKS, seed=2), 12
    ids_BT, targets = marked(frames)
    got = model.losses(ids_BT, targets=targets)["tokens"].detach()
    assert targets.tokens_BN is not None and targets.spoken_BT is not None
    nats = []
    with torch.no_grad():
        for b, length in enumerate((7, 4)):
            alone_1T = ids_BT[b : b + 1, : length + 1 + 3]
            h_PD = model.trunk(alone_1T).h_BPD[0, -3:]
            logits_KV = model.talker_head.token_logits(h_PD[None])[0].double()
            nats += [-F.log_softmax(logits_KV[n // 5], 0)[targets.tokens_BN[b, n]] for n in range(frames)]
    alike(got, torch.stack(nats).mean())


def test_what_is_said_is_what_the_marks_answer() -> None:
    model, frames = ArbModel(SPEAKS, seed=2), 12
    ids_BT = torch.tensor([list(b"abcdefg")])
    said_1N = model.say(ids_BT, frames)
    assert said_1N.shape == (1, frames) and said_1N.dtype == torch.int64
    with torch.no_grad():
        whole = torch.cat([ids_BT, torch.tensor([spoken_marks(frames)])], dim=1)
        logits = model.talker_head.token_logits(model.trunk(whole).h_BPD[:, -3:])
    exact(said_1N, logits.argmax(dim=-1).repeat_interleave(5, dim=1)[:, :frames])
    with pytest.raises(ValueError, match="frames is 0"):
        model.say(ids_BT, 0)
    with pytest.raises(RuntimeError, match="talker head"):
        ArbModel(models.NANO).say(ids_BT, 3)


def test_a_text_is_learned_to_be_said() -> None:
    """The letters decide the tokens of every mark, which no position of a letter alone could know."""
    model, num_steps = ArbModel(with_modules(SPEAKS, vq=False), seed=1), 40

    def lesson(step: int) -> tuple[Tensor, Targets]:
        draw_B2 = torch.randint(0, 2, (8, 2), generator=torch.Generator().manual_seed(step))
        texts_B4 = torch.stack([97 + draw_B2[:, 0], 0 * draw_B2[:, 0] + 32, 97 + draw_B2[:, 1]], dim=1)
        ids_BT = torch.cat([texts_B4, torch.tensor([spoken_marks(20)]).expand(8, -1)], dim=1)
        spoken_BT = (torch.arange(ids_BT.shape[1]) > 3).expand(8, -1)
        tokens_BN = (40 * draw_B2).repeat_interleave(10, dim=1)
        return ids_BT, Targets(tokens_BN=tokens_BN, spoken_BT=spoken_BT)

    for step in range(num_steps):
        ids_BT, targets = lesson(step)
        losses = {"tokens": model.losses(ids_BT, targets=targets)["tokens"]}
        assert model.backward(losses, rate=6.0 * (1 - step / num_steps), step=step)
        model.step()
    ids_BT, targets = lesson(1000)
    assert targets.tokens_BN is not None
    assert model.say(ids_BT[:, :3], 20).eq(targets.tokens_BN).float().mean() > 0.95


@pytest.mark.parametrize(
    ("spoken_BT", "error", "says"),
    [
        (torch.ones(2, 6), TypeError, "spoken_BT has dtype float32"),
        (torch.ones(2, 5, dtype=torch.bool), ValueError, "spoken_BT has shape"),
        (torch.zeros(2, 6, dtype=torch.bool), ValueError, "same number in each sequence"),
        (torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool(), ValueError, "same number"),
        (torch.tensor([[0, 1, 0, 0, 0, 0]] * 2).bool(), ValueError, "first two ids"),
    ],
)
def test_marks_that_do_not_fit(spoken_BT: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        spoken_streams(torch.zeros(2, 4, 8), spoken_BT)


def test_more_tokens_than_the_marks_say_are_refused() -> None:
    ids_BT, targets = marked(12)
    assert targets.tokens_BN is not None
    more = replace(targets, tokens_BN=targets.tokens_BN.repeat(1, 2))
    with pytest.raises(ValueError, match="at most 15 tokens"):
        ArbModel(SPEAKS).losses(ids_BT, targets=more)
