"""Models in the real library transformers: its Auto classes, `generate` and pipelines give what `ArbModel` gives."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor import ArbModel
from arbitor.optimized.training.checkpoint import state_sha256
from arbitor.optimized.training.loop import train
from arbitor.reference.config import NUM_BYTES, SPECIAL_IDS
from conformance.training import nano
from conformance.training.nano import IDS
from conformance.training.runs import options

PROMPTS = ["what is h\u00e9r name? ", "a", "<pad> is text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ArbModel(nano.WHOLE, device="cpu", seed=3)
    assert model.backward(model.losses(IDS), rate=6.0, step=0)
    model.step()
    path = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(hub: Any, folder: Path) -> Any:
    return hub.AutoTokenizer.from_pretrained(folder)


def test_the_auto_classes_load_a_folder(hub: Any, folder: Path, model: Any, tokenizer: Any) -> None:
    own = ArbModel.from_pretrained(folder, device="cpu")
    config = hub.AutoConfig.from_pretrained(folder)
    assert config.arb() == own.config and config.model_type == "arbitor"
    assert (config.num_hidden_layers, config.hidden_size) == (nano.WHOLE.num_layers, nano.WHOLE.width)
    assert state_sha256(model.arb.state()) == state_sha256(own.state()) and not model.training
    assert model.num_parameters() == own.num_weights
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.to("cpu") is model and type(tokenizer).__name__ == "ByteTokenizer"
    model.tie_weights()


def test_the_auto_classes_load_a_run(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nano.register(monkeypatch)
    nano.without_pictures(monkeypatch)
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(nano.TEXT)
    train(options(text, run, steps=1))
    model = hub.AutoModelForCausalLM.from_pretrained(run)
    assert state_sha256(model.arb.state()) == state_sha256(
        ArbModel.from_pretrained(run, device="cpu").state()
    )
    assert hub.pipeline("text-generation", model=str(run))("to", max_new_tokens=2)
    model.save_pretrained(tmp_path / "model")
    # What a run says of itself, paths among it, is nothing of its model.
    assert (
        not {"run", "baselines", "beginning"}
        & json.loads((tmp_path / "model/config.json").read_text()).keys()
    )


def test_a_model_is_saved_for_both(
    hub: Any, folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "again", safe_serialization=True)
    tokenizer.save_pretrained(tmp_path / "again")
    again = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (
        state_sha256(again.arb.state())
        == state_sha256(model.arb.state())
        == state_sha256(ArbModel.from_pretrained(tmp_path / "again", device="cpu").state())
    )
    assert hub.AutoTokenizer.from_pretrained(tmp_path / "again").encode("abc") == [97, 98, 99]


def test_logits_and_loss_are_those_of_the_model(model: Any) -> None:
    with torch.no_grad():
        output = model(input_ids=IDS, labels=IDS)
        own = model.arb(IDS)
    assert torch.equal(output.logits[:, 2:], own) and not output.logits[:, :2].any()
    assert output.past_key_values is None
    # The two first places know nothing: all ids are alike.
    labels = IDS.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=labels).loss, model.arb.loss(IDS))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_sequence_sees_no_padding(model: Any, tokenizer: Any, side: str, use_cache: bool) -> None:
    tokenizer.padding_side = side
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_BTV = model(**batch, use_cache=use_cache).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(input_ids=torch.tensor([list(prompt.encode())]), use_cache=use_cache).logits[0]
            assert torch.equal(logits_BTV[row][batch["attention_mask"][row].bool()], alone)
            assert torch.equal(alone[-1] != 0, torch.ones_like(alone[-1], dtype=torch.bool))


def test_generate_adds_what_the_model_adds(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    added = model.generate(**batch, max_new_tokens=9, do_sample=False)[:, length:]
    own = model.arb.generate([prompt.encode() for prompt in PROMPTS], max_new_bytes=9, temperature=0)
    assert [bytes(row) for row in added.tolist()] == own
    torch.manual_seed(0)
    drawn = model.generate(**batch, max_new_tokens=30, do_sample=True, temperature=5.0)[:, length:]
    assert int(drawn.max()) < NUM_BYTES


def test_a_step_reads_what_is_new_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = model.arb.forward

    def watched(ids_BT: torch.Tensor, **more: Any) -> torch.Tensor:
        read.append(ids_BT.shape[1])
        return real(ids_BT, **more)

    monkeypatch.setattr(model.arb, "forward", watched)
    model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    assert read == [IDS.shape[1], 1, 1, 1]


def test_what_was_read_has_two_names(model: Any) -> None:
    """Newer versions of the library hand on what was read as `cache`, and older ones as `past_key_values`."""
    with torch.no_grad():
        logits = []
        for name in ("past_key_values", "cache"):
            read = model(input_ids=IDS[:, :-2], use_cache=True).past_key_values
            given = model.prepare_inputs_for_generation(IDS, **{name: read})
            assert torch.equal(given.pop("input_ids"), IDS[:, -2:])
            assert given.pop("past_key_values") is read
            logits.append(model(input_ids=IDS[:, -2:], **{name: read}).logits)
        assert torch.equal(*logits)
        with pytest.raises(ValueError, match="cache and past_key_values are both given"):
            model(input_ids=IDS[:, -2:], past_key_values=read, cache=read)
        with pytest.raises(TypeError, match="cache is a object, but must be what an earlier call returned"):
            model(input_ids=IDS[:, -2:], cache=object())
        made = model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False, guidance_scale=1.5)
        assert made.shape == (1, IDS.shape[1] + 3)


def test_beams_go_on_from_their_own_past(model: Any) -> None:
    """In another order what was read goes with its sequence."""
    following = torch.tensor([[1], [2]])
    with torch.no_grad():
        kept = model(input_ids=IDS, use_cache=True).past_key_values
        other = model(input_ids=IDS, use_cache=True).past_key_values.reorder_cache(torch.tensor([1, 0]))
        logits = model(input_ids=following, past_key_values=kept, use_cache=True).logits
        again = model(input_ids=following[[1, 0]], past_key_values=other, use_cache=True).logits
    assert torch.equal(again.argmax(-1), logits[[1, 0]].argmax(-1))
    for row, sequence in enumerate((1, 0)):
        transcript = [*IDS[sequence].tolist(), *following[sequence].tolist()]
        # What the model itself would say next stands there unread.
        assert other.ledger.ids(row).tolist()[:-1] == transcript
    found = model.generate(input_ids=IDS, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert found.shape == (4, IDS.shape[1] + 4) and found[0].tolist() != found[1].tolist()


def test_a_pipeline_writes(hub: Any, folder: Path) -> None:
    write = hub.pipeline("text-generation", model=str(folder))
    [answer] = write("to be", max_new_tokens=4, do_sample=False, return_full_text=False)
    own = ArbModel.from_pretrained(folder, device="cpu").generate("to be", max_new_bytes=4, temperature=0)
    assert answer["generated_text"] == own
    assert len(write(["to", "be or"], max_new_tokens=2, batch_size=2)) == 2


@given(text=st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_text_is_its_bytes_and_comes_back(hub: Any, text: str) -> None:
    tokenizer = importlib.import_module("arbitor.transformers").ByteTokenizer()
    raw = text.encode("utf-8", errors="replace").decode()
    assert tokenizer.encode(raw) == list(raw.encode())
    assert tokenizer.decode(tokenizer.encode(raw)) == raw


def test_bytes_that_are_no_text_and_specials(tokenizer: Any) -> None:
    assert tokenizer.encode("\udcff<pad><eos> \n") == [255, *b"<pad><eos> \n"]
    ids = [SPECIAL_IDS["BOS"], *b"ab", 255, SPECIAL_IDS["PAD"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab\ufffd"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == tuple(
        SPECIAL_IDS[name] for name in ("PAD", "BOS", "EOS")
    )


def test_what_the_model_cannot_do_is_refused(hub: Any, folder: Path, model: Any) -> None:
    load = hub.AutoModelForCausalLM.from_pretrained
    for arguments, says in (
        ({"input_ids": IDS, "return_dict": False}, "return_dict is False"),
        (
            {"input_ids": IDS, "inputs_embeds": IDS.float()},
            "inputs_embeds is given, but the model does not read it",
        ),
        (
            {"input_ids": IDS, "num_items_in_batch": 2},
            "call ArbOptimizer.backward in training_step of the trainer",
        ),
        ({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}, "attention_mask has row 0 with no ids"),
        (
            {"input_ids": IDS[:1, :3], "attention_mask": torch.tensor([[1, 0, 1]])},
            "or padding between ids",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            model(**arguments)
    with pytest.raises(ValueError, match="use_cache is False, but generate must keep"):
        model.generate(input_ids=IDS, max_new_tokens=2, use_cache=False)
    with pytest.raises(ValueError, match="must name one device for the whole model"):
        load(folder, device_map={"a": "cpu", "b": "meta"})
    with pytest.raises(ValueError, match="config has no model"):
        hub.AutoModelForCausalLM.from_config(hub.AutoConfig.for_model("arbitor"))


def test_a_backward_pass_of_the_library_trains_nothing(model: Any) -> None:
    before = state_sha256(model.arb.state())
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError):
        model.arb.step()
    assert state_sha256(model.arb.state()) == before


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "arbitor.transformers", raising=False)
    with pytest.raises(
        ImportError, match=r"needs the package 'transformers', which is not installed: pip install"
    ):
        importlib.import_module("arbitor.transformers")
