"""What the tests of refusals ask for: the exception, and a sentence in any words that names the argument."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from conformance.families import REFUSALS
from conformance.refusal import Refusal, fault, meta, names_of, ones, refused, weight
from conformance.subject import Subject

CASE = refused("sign_votes", "step 0", ValueError, "step_size", ones(2, 3), 0)


def answer(case: Refusal, op: Any) -> str:
    """Return what the suite finds wrong with an implementation of the op of a case."""
    return fault(Subject(SimpleNamespace(**{case.op: op}), "another"), case)


def raises(error: Exception) -> Any:
    """Return an op that refuses every call."""

    def op(*args: Any, **kwargs: Any) -> None:
        raise error

    return op


def test_a_sentence_may_have_any_words() -> None:
    """The words of the reference are its own. An implementation only has to name the argument."""
    for case in REFUSALS:
        for name in names_of(case):
            found = answer(case, raises(case.error(f"I cannot use {name}: it is wrong.")))
            assert not found, found


def test_what_a_sentence_must_name_is_an_argument() -> None:
    """A refusal does not ask for words that only the reference has."""
    for case in REFUSALS:
        first = names_of(case)[0].partition("[")[0]
        parameters = inspect.signature(getattr(reference_ops, case.op)).parameters
        assert first in parameters, f"{case.op} on {case.why}: {first} is no argument"


def test_either_of_two_arguments_that_do_not_fit_may_be_named() -> None:
    case = next(case for case in REFUSALS if (case.op, case.why) == ("gated", "two shapes"))
    assert names_of(case) == ["up", "gate"]


def test_a_call_is_built_anew_each_time_and_told_with_its_devices() -> None:
    case = refused("apply_steps", "two", ValueError, "weights", (weight, weight), out=(ones(2), meta(2)))
    first, second = case.call(), case.call()
    assert first[0][0][0] is not second[0][0][0] and isinstance(first[1]["out"][0], Tensor)
    call = "(a weight [3, 14], a weight [3, 14]), out=(float32 [2], float32 [2] on meta)"
    assert answer(case, lambda *_, **__: None).startswith(f"apply_steps on two ({call}): nothing is raised")


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (lambda *_: None, "nothing is raised, want a ValueError that names step_size"),
        (raises(TypeError("step_size is 0")), "TypeError('step_size is 0'), want a ValueError"),
        (raises(ValueError("the step is 0")), "the sentence names another argument"),
        (raises(ValueError("my_step_size is 0")), "the sentence names another argument"),
        (raises(ValueError("step_size is 0\nno")), "the message takes more than a sentence"),
    ],
)
def test_a_wrong_answer_is_told_in_a_line_with_the_call(op: Any, wrong: str) -> None:
    found = answer(CASE, op)
    assert found.startswith("sign_votes on step 0 (float32 [2, 3], 0): ") and wrong in found, found
    assert len(found.splitlines()) == (2 if "\n" in found else 1)


def test_what_was_written_before_a_refusal_is_told() -> None:
    def op(grad_NK: Tensor, step_size: int) -> Tensor:
        grad_NK.zero_()
        raise ValueError("step_size is 0")

    assert "sign_votes wrote to [0][0], then raised ValueError" in answer(CASE, op)


def test_the_reference_passes() -> None:
    subject = Subject(reference_ops, "arbitor.reference.ops", str(torch.device("cpu")))
    assert not [found for case in REFUSALS if (found := fault(subject, case))]
