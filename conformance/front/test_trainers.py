"""What trainers and loops of the library transformers do with a model: right, or refused in a sentence."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arbitor import ArbModel, ArbOptimizer, adapters
from arbitor.nn import Linear, Ternary
from arbitor.optimized.training.checkpoint import state_sha256
from conformance.report import skip
from conformance.training import nano
from conformance.training.nano import IDS

ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    ArbModel(nano.NANO, device="cpu", seed=3).save_pretrained(path)
    return path


def trainer(
    hub: Any,
    where: Path,
    model: Any,
    *,
    kind: Any = None,
    steps: int = 3,
    saves: Any = None,
    batch: int = 2,
    gradient_accumulation_steps: int = 1,
    **more: Any,
) -> Any:
    if importlib.util.find_spec("accelerate") is None:
        skip("a Trainer of transformers", "accelerate is not installed")
    arguments = hub.TrainingArguments(
        output_dir=str(where),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=gradient_accumulation_steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **({"save_strategy": "no"} if saves is None else saves),
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    return (kind or hub.Trainer)(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **more)


def test_a_mask_says_which_places_are_ids(model: Any) -> None:
    for mask, says in (
        (ONES[:, :5], r"has shape \(2, 5\), but must have that of the ids, \(2, 18\)"),
        (torch.ones(2, 30), r"has shape \(2, 30\)"),
        (ONES[:1], r"has shape \(1, 18\)"),
        (ONES * 2, "other than 0 and 1"),
        (ONES * 0.5, "other than 0 and 1"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask .*{says}"):
            model(input_ids=IDS, attention_mask=mask)
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"must have that of the ids, \(2, 20\)"):
            model(input_ids=IDS[:, :2], past_key_values=cache, attention_mask=ONES[:, :2])
        with pytest.raises(ValueError, match="padding among ids that follow"):
            mask = torch.cat([ONES, ONES[:, :1], ONES[:, :1] * 0], dim=1)
            model(input_ids=IDS[:, :2], past_key_values=cache, attention_mask=mask)
        for kind in (torch.bool, torch.float32):
            whole = model(input_ids=IDS, attention_mask=ONES.to(kind)).logits
            assert torch.equal(whole, model(input_ids=IDS).logits)


def test_padding_behind_a_prompt_is_refused(model: Any) -> None:
    mask = ONES.clone()
    mask[1, -3:] = 0
    with pytest.raises(ValueError, match=r"padding behind a prompt, .* padding_side to left"):
        model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2)


def test_places_that_nothing_is_said_of_add_nothing_to_a_loss(model: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, model.arb.loss(IDS))
        padded = torch.nn.functional.pad(IDS, (4, 0))
        mask = torch.nn.functional.pad(ONES, (4, 0))
        labels = padded.masked_fill(mask == 0, -100)
        assert torch.equal(
            model(input_ids=padded, attention_mask=mask, labels=labels).loss, model.arb.loss(IDS)
        )
        # What was read says something of the first id that follows.
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        following = IDS[:, 3:6]
        output = model(input_ids=following, past_key_values=cache, labels=following)
        wanted = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), following[:, 1:].flatten()
        )
        assert torch.equal(output.loss, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"input_ids has shape \(18,\)"),
        ({"input_ids": IDS[:0]}, ValueError, r"input_ids has shape \(0, 18\)"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids is a list"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError, "labels has shape"),
        ({"input_ids": IDS, "labels": IDS + 300}, ValueError, "labels has 4[0-9]{2}, but must have ids from 0 to"),
        ({"input_ids": IDS, "labels": IDS - 130}, ValueError, "labels has -"),
        ({"input_ids": IDS, "past_key_values": object()}, TypeError, "past_key_values is a object, .* use_cache=True"),
        ({"input_ids": IDS, "position_ids": IDS}, ValueError, "position_ids is given, .* counts positions itself"),
        ({"input_ids": IDS, "logits_to_keep": 1}, ValueError, "logits_to_keep is given"),
        ({"input_ids": IDS, "cache_position": IDS[0]}, ValueError, "cache_position is given"),
        ({"input_ids": IDS, "output_attentions": True}, ValueError, "output_attentions is given"),
    ],
)  # fmt: skip
def test_what_a_call_does_not_read_is_refused(
    model: Any, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_in_8bit", True),
        ("quantization_config", {"load_in_8bit": True}),
        ("attn_implementation", "flash_attention_2"),
        ("state_dict", {}),
        ("nonsense", 3),
        ("output_loading_info", True),
        ("use_safetensors", 1),
    ],
)
def test_what_loading_does_not_read_is_refused(hub: Any, folder: Path, name: str, value: Any) -> None:
    for load in (
        hub.AutoModelForCausalLM.from_pretrained,
        importlib.import_module("arbitor.transformers").ArbForCausalLM.from_pretrained,
    ):
        with pytest.raises(ValueError, match=f"{name} is given, but the model does not read it"):
            load(folder, **{name: value})


def test_options_that_change_nothing_are_taken(hub: Any, folder: Path, tmp_path: Path) -> None:
    model = hub.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, low_cpu_mem_usage=True, local_files_only=True, use_safetensors=True
    )
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    model.save_pretrained(tmp_path / "model", max_shard_size="1GB")
    for name, value in (("push_to_hub", True), ("repo_id", "a/b"), ("state_dict", {}), ("variant", "fp16")):
        with pytest.raises(ValueError, match=f"{name} is given, but the model does not read it"):
            model.save_pretrained(tmp_path / "model", **{name: value})


def test_settings_of_the_library_come_back(hub: Any, folder: Path, model: Any, tmp_path: Path) -> None:
    model.generation_config.max_new_tokens = 3
    model.config.problem_type = "single_label_classification"
    model.config.model = {"not": "read"}
    model.save_pretrained(tmp_path)
    again = hub.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.max_new_tokens == 3
    assert again.config.problem_type == "single_label_classification"
    assert again.config.model == json.loads(nano.NANO.to_json())
    assert again.generate(IDS).shape[1] == IDS.shape[1] + 3
    assert ArbModel.from_pretrained(tmp_path, device="cpu").config == nano.NANO
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation_config"):
        hub.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = hub.AutoConfig.from_pretrained(folder)
    config.model["num_layers"] += 1
    with pytest.raises(ValueError, match="config describes another model than the checkpoint"):
        hub.AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_a_trainer_that_casts_no_votes_is_refused(hub: Any, model: Any, tmp_path: Path) -> None:
    before = state_sha256(model.arb.state())
    with pytest.raises(
        ValueError, match=r"num_items_in_batch is given, .* call ArbOptimizer.backward in training_step"
    ):
        trainer(hub, tmp_path, model).train()

    class Usual(hub.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
            return model(**inputs).loss

    with pytest.raises(RuntimeError, match=r"outside of model.backward"):
        trainer(hub, tmp_path, model, kind=Usual).train()
    assert state_sha256(model.arb.state()) == before


def test_a_trainer_evaluates(hub: Any, model: Any, tmp_path: Path) -> None:
    found = trainer(hub, tmp_path, model).evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(model.arb.loss(IDS)), abs=1e-6)


def test_a_trainer_trains_adapters(hub: Any, model: Any, tmp_path: Path) -> None:
    adapters.attach(model.arb, rank=2, targets="value_up")
    before = state_sha256(model.arb.state())
    trained = trainer(hub, tmp_path, model, steps=4)
    first = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < first
    assert state_sha256(model.arb.state()) == before
    # Counted by a trainer, the items of all micro-batches of a step divide the sum.
    with torch.no_grad():
        alone = model(input_ids=IDS, labels=IDS).loss
    shared = model(input_ids=IDS, labels=IDS, num_items_in_batch=60).loss
    assert float(shared.detach()) == pytest.approx(float(alone) * 2 * (IDS.shape[1] - 3) / 60)


def voting(hub: Any, where: Path, model: Any, **more: Any) -> Any:
    """A trainer whose passes vote, as docs/python.md has it."""
    optimizer = ArbOptimizer(model.arb, rate=6.0, accum=more.get("gradient_accumulation_steps", 1))

    class Voting(hub.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**self._prepare_inputs(inputs)).loss
            optimizer.backward(loss)
            return loss.detach()

    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    return trainer(hub, where, model, kind=Voting, optimizers=(optimizer, schedule), **more)


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def test_a_trainer_goes_on_from_its_own_checkpoint(hub: Any, folder: Path, tmp_path: Path) -> None:
    def fresh() -> Any:
        return hub.AutoModelForCausalLM.from_pretrained(folder)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    voting(hub, tmp_path / "whole", whole, steps=4).train()
    voting(hub, tmp_path / "run", stopped, steps=2, saves=EVERY_STEP).train()
    voting(hub, tmp_path / "run", resumed, steps=4).train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
    )
    assert state_sha256(whole.arb.state()) == state_sha256(resumed.arb.state())
    assert state_sha256(whole.arb.state()) != state_sha256(stopped.arb.state())
    assert (whole.arb.steps_taken, stopped.arb.steps_taken, resumed.arb.steps_taken) == (4, 2, 4)


def test_micro_batches_of_a_trainer_are_summed(hub: Any, folder: Path, tmp_path: Path) -> None:
    """Two of one row each are a step, and their sums vote once."""
    trained, plain = (hub.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    seen: list[Any] = []
    its = voting(hub, tmp_path / "run", trained, steps=3, batch=1, gradient_accumulation_steps=2)
    prepare = its._prepare_inputs
    its._prepare_inputs = lambda inputs: seen.append(inputs["input_ids"]) or prepare(inputs)
    its.train()
    assert len(seen) == 6 and trained.arb.steps_taken == 3
    for number, ids_BT in enumerate(seen):
        rate = 6.0 * (1 - 0.9 * (number // 2) / 4)
        loss = plain(input_ids=ids_BT, labels=ids_BT).loss
        plain.arb.backward(loss, rate=rate, step=number, accum=2)
        if number % 2:
            plain.arb.step()
    assert state_sha256(trained.arb.state()) == state_sha256(plain.arb.state())


def test_a_loop_with_accelerate_votes(hub: Any, folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("accelerate") is None:
        skip("a loop with accelerate", "accelerate is not installed")
    accelerate = importlib.import_module("accelerate")
    # What a Trainer of this process left: the end of its data would end each step.
    accelerate.state.GradientState._reset_state()
    states = []
    for prepares in (True, False):
        model = hub.AutoModelForCausalLM.from_pretrained(folder)
        optimizer = ArbOptimizer(model.arb, rate=6.0, accum=2)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if prepares:
            model, prepared = accelerator.prepare(model, optimizer)
        for place in range(4):
            loss = model(input_ids=IDS[:, place:], labels=IDS[:, place:]).loss
            if not prepares:
                optimizer.backward(loss)
                if place % 2:
                    optimizer.step()
                continue
            with accelerator.accumulate(model):
                prepared.optimizer.backward(loss)
                prepared.step()
                prepared.zero_grad()
        states.append(state_sha256(model.arb.state()))
        assert (optimizer.passes, model.arb.steps_taken) == (4, 2)
        if prepares:
            accelerator.save_state(str(tmp_path))
            prepared.optimizer.backward(model(input_ids=IDS, labels=IDS).loss)
            model.arb.step()
            accelerator.load_state(str(tmp_path))
            assert (optimizer.passes, model.arb.steps_taken) == (4, 2)
            assert state_sha256(model.arb.state()) == states[-1]
    assert states[0] == states[1]


def test_a_trainer_goes_on_with_adapters(hub: Any, folder: Path, tmp_path: Path) -> None:
    def fresh() -> Any:
        model = hub.AutoModelForCausalLM.from_pretrained(folder)
        adapters.attach(model.arb, rank=2, targets="value_up")
        return model

    whole, stopped, resumed = fresh(), fresh(), fresh()
    trainer(hub, tmp_path / "whole", whole, steps=4).train()
    trainer(hub, tmp_path / "run", stopped, steps=2, saves=EVERY_STEP).train()
    trainer(hub, tmp_path / "run", resumed, steps=4).train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
    )
    pairs = list(zip(whole.parameters(), resumed.parameters(), stopped.parameters(), strict=True))
    assert pairs and all(torch.equal(one, other) for one, other, _ in pairs)
    assert not all(torch.equal(one, earlier) for one, _, earlier in pairs)


def test_a_trainer_ends_with_its_best_checkpoint(hub: Any, model: Any, tmp_path: Path) -> None:
    saves = {
        **EVERY_STEP,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        # So the first checkpoint is the best.
        "metric_for_best_model": "eval_runtime",
        "greater_is_better": True,
    }

    def first_is_best(found: Any) -> None:
        found["eval_runtime"] = -trained.state.global_step

    class Watch(hub.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, *args: Any, metrics: Any, **more: Any) -> None:
            first_is_best(metrics)

    trained = voting(hub, tmp_path, model, saves=saves, callbacks=[Watch()])
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-1")
    best = ArbModel.from_pretrained(tmp_path / "checkpoint-1", device="cpu")
    last = ArbModel.from_pretrained(tmp_path / "checkpoint-3", device="cpu")
    assert state_sha256(model.arb.state()) == state_sha256(best.state()) != state_sha256(last.state())


def test_a_file_of_another_model_is_not_loaded(hub: Any, folder: Path, model: Any) -> None:
    load_file = importlib.import_module("safetensors.torch").load_file
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    before = state_sha256(model.arb.state())
    short = {each: tensor for each, tensor in tensors.items() if each != name}
    for given, says in (
        (short, f"state_dict has no '{name}'"),
        ({**tensors, "more": tensors[name]}, "state_dict has 'more'"),
        ({**tensors, "x.lora_A": tensors[name]}, r"has 'x.lora_A', .* attach the same adapters"),
        ({**tensors, name: tensors[name][:1]}, "shape"),
    ):
        with pytest.raises(ValueError, match=says):
            model.load_state_dict(given, strict=False)
    assert state_sha256(model.arb.state()) == before
    assert model.load_state_dict(tensors) == model.load_state_dict(model.state_dict())


def test_adapters_of_peft_say_what_to_do(hub: Any, model: Any, tmp_path: Path) -> None:
    for refused in (model.add_adapter, model.load_adapter):
        with pytest.raises(ValueError, match=r"use attach or load_adapter of arbitor.adapters"):
            refused(object())
    with pytest.raises(ValueError, match="the model has 297"):
        model.resize_token_embeddings(300)
    own = model.arb
    named: list[Callable[[], Any]] = [lambda: own, lambda: model]
    for saved in named:
        adapters.attach(saved(), rank=2, targets="value_up")
        adapters.save_adapter(saved(), tmp_path)
        adapters.detach(own)
        for loaded in named:
            assert adapters.load_adapter(loaded(), tmp_path)
            adapters.detach(own)


def test_tokens_are_bytes_for_good(hub: Any, folder: Path) -> None:
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="new_tokens has '<x>', but must have none"):
        tokenizer.add_tokens(["<x>"])
    with pytest.raises(ValueError, match="new_tokens has '<y>'"):
        tokenizer.add_special_tokens({"pad_token": "<y>"})
    assert tokenizer.add_tokens("<pad>") == 0 == tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.encode("<x>") == list(b"<x>")


def test_a_wrapper_is_named(hub: Any, model: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a ArbForCausalLM, .* give its attribute arb$"):
        ArbOptimizer(model, rate=6.0)


def test_what_a_trainer_and_a_pipeline_must_be_given_is_named(hub: Any, model: Any, tmp_path: Path) -> None:
    ternary = Ternary(torch.nn.Sequential(Linear(12, 12), torch.nn.Linear(12, 2)))
    for given, says in (
        (model.arb, r"type ArbModel, but must be given ArbForCausalLM\(arb=model\)"),
        (ternary, "type Ternary, but must be given its attribute module"),
    ):
        with pytest.raises(TypeError, match=f"a Trainer of transformers was given a model of {says}"):
            trainer(hub, tmp_path, given)
        with pytest.raises(TypeError, match=f"a pipeline of transformers was given a model of {says}"):
            given.can_generate()
    assert dict(inspect.getmembers(model))["arb"] is model.arb


def test_a_model_is_wrapped(hub: Any, model: Any) -> None:
    kind = type(model)
    again = kind(arb=model.arb)
    assert again.arb is model.arb and again.config.model == model.config.model
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(
        TypeError, match="arb is a NoneType, but must be an ArbModel, or config a configuration"
    ):
        kind()
    with pytest.raises(TypeError, match=r"arb is a ArbForCausalLM, .*: give its attribute arb"):
        kind(arb=model)
    with pytest.raises(TypeError, match="pretrained_model_name_or_path is a NoneType, but must be a path"):
        kind.from_pretrained(None)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_configuration_says_whether_to_keep_what_was_read(hub: Any, folder: Path, use_cache: bool) -> None:
    assert hub.AutoConfig.from_pretrained(folder).use_cache is True
    model = hub.AutoModelForCausalLM.from_pretrained(folder, use_cache=use_cache)
    assert model.config.use_cache is use_cache
    assert model.generate(IDS[:1], max_new_tokens=2).shape == (1, IDS.shape[1] + 2)


def test_a_model_is_on_one_device(hub: Any, folder: Path) -> None:
    for device_map in ("balanced", "sequential"):
        with pytest.raises(ValueError, match=f"device_map is '{device_map}', but must be auto or one device"):
            hub.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert hub.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).device.type == "cpu"


def test_a_model_of_the_library_is_in_no_graph(model: Any) -> None:
    says = r"an ArbModel, .*, run outside of graphs of torch\.compile: compile without fullgraph=True"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=says):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS, labels=IDS)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS, labels=IDS).loss, model.arb.loss(IDS))
    assert counter.frame_count == 0


def test_peft_says_why_it_ends(model: Any) -> None:
    if importlib.util.find_spec("peft") is None:
        skip("get_peft_model", "peft is not installed")
    peft = importlib.import_module("peft")
    for given in (model, model.arb):
        with pytest.raises(
            StopIteration, match=r"weights are integers: .* arbitor.adapters puts float adapters"
        ):
            peft.get_peft_model(given, peft.LoraConfig(target_modules=["value_up"]))


def test_logits_have_the_dtype_of_a_wide_model(hub: Any, model: Any) -> None:
    model.arb.to(torch.float64)
    with torch.no_grad():
        wide = model(input_ids=IDS).logits
        assert wide.dtype is torch.float64 and torch.equal(wide[:, 2:], model.arb(IDS))
        again = model(input_ids=IDS, use_cache=True)
        assert model(input_ids=IDS, past_key_values=again.past_key_values).logits.dtype is torch.float64
