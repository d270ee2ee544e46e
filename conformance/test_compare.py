"""The comparers are tested with outputs that were tampered with, and the poison with memory that was not written.

No test may change what another one draws.
"""

from __future__ import annotations

import ast
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arbitor.reference import ops as reference_ops
from arbitor.reference.ops.packing import weight_of_trits
from arbitor.reference.types import TernaryWeight
from conformance.compare import (
    alike,
    exact,
    model_no_worse,
    no_worse,
    one_rounding,
    roundings,
    unsigned_zeros,
)
from conformance.import_lint import ROOT
from conformance.poison import PATTERNS, poisoned
from conformance.report import LEDGER
from conformance.subject import Subject


def _weight() -> TernaryWeight:
    return weight_of_trits(torch.ones(2, 13, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.int8))


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1000]), torch.tensor([1001])),
        (torch.tensor([1], dtype=torch.int32), torch.tensor([1], dtype=torch.int64)),
        (torch.tensor([[1]]), torch.tensor([1])),
        (torch.tensor([-0.0]), torch.tensor([0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2.0**-23])),
        (torch.tensor([math.nan]), torch.tensor([0.0])),
        ([torch.tensor([1])], torch.tensor([1])),
        ((torch.tensor([1]),), (torch.tensor([1]), torch.tensor([1]))),
        (1, True),
        (3, 3.0),
    ],
)
def test_exact_rejects(got: object, want: object) -> None:
    with pytest.raises(AssertionError):
        exact(got, want)


@pytest.mark.parametrize("name", ["packed", "exponents", "trit_accum", "exponent_accum"])
def test_exact_rejects_one_byte_of_a_weight(name: str) -> None:
    weight = _weight()
    other = weight.clone()
    exact(other, weight)
    other.tensors()[name].view(-1)[-1] += 1
    with pytest.raises(AssertionError, match=name):
        exact(other, weight)


def test_exact_accepts_equal_bits() -> None:
    exact(torch.tensor([math.nan, -0.0]), torch.tensor([math.nan, -0.0]))
    exact(torch.zeros(0, 3), torch.zeros(0, 3))
    exact((1, torch.tensor(2)), (1, torch.tensor(2)))
    exact(unsigned_zeros(torch.tensor([-0.0])), torch.tensor([0.0]))


def _sum_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a twin, the true value and the magnitude of row sums."""
    x = torch.randn(33, 200, generator=torch.Generator().manual_seed(3)).to(dtype)
    wide = x.to(torch.float64)
    return x.float().sum(dim=1).to(dtype), wide.sum(dim=1), wide.abs().sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_accepts_the_twin_and_another_order(dtype: torch.dtype) -> None:
    twin, wide, magnitude = _sum_case(dtype)
    no_worse(twin, twin=twin, wide=wide, magnitude=magnitude, k=2.0)
    no_worse(wide.to(dtype), twin=twin, wide=wide, magnitude=magnitude, k=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tamper", ["zeros", "one element", "nan", "inf", "lower precision", "dtype", "shape"]
)
def test_no_worse_rejects(dtype: torch.dtype, tamper: str) -> None:
    twin, wide, magnitude = _sum_case(dtype)
    got = twin.clone()
    if tamper == "zeros":
        got = torch.zeros_like(twin)
    elif tamper == "one element":
        got[7] += 8 * one_rounding(dtype, wide, magnitude)[7].to(dtype)
    elif tamper in ("nan", "inf"):
        got[7] = float(tamper)
    elif tamper == "lower precision":
        # bfloat16 in place of float32, and seven bits in place of bfloat16.
        got = twin.to(torch.bfloat16).to(dtype) if dtype == torch.float32 else (twin * 1.02).to(dtype)
    elif tamper == "dtype":
        got = twin.to(torch.float64)
    else:
        got = twin[None]
    with pytest.raises(AssertionError):
        no_worse(got, twin=twin, wide=wide, magnitude=magnitude, k=2.0)


def test_no_worse_rejects_sums_kept_in_bfloat16() -> None:
    x = torch.randn(33, 200, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    wide = x.to(torch.float64)
    narrow = torch.zeros(33, dtype=torch.bfloat16)
    for column in x.T:
        narrow = narrow + column
    twin = x.float().sum(dim=1).to(torch.bfloat16)
    with pytest.raises(AssertionError):
        no_worse(narrow, twin=twin, wide=wide.sum(dim=1), magnitude=wide.abs().sum(dim=1), k=2.0)


def test_no_worse_looks_at_every_row() -> None:
    """A row a billion times smaller is held to its own size. An error of its largest neighbour's size would hide it."""
    twin, wide, magnitude = _sum_case(torch.float32)
    scale = torch.ones(33)
    scale[5] = 1e-9
    got = twin * scale
    got[5] *= 1.001
    with pytest.raises(AssertionError):
        no_worse(got, twin=twin * scale, wide=wide * scale, magnitude=magnitude * scale, k=2.0)


def test_model_no_worse_measures_by_the_worst_output_of_the_twin() -> None:
    """A lucky output of the twin is no yardstick, and one output that is wrong is enough."""
    wide = {"stream": torch.ones(64, dtype=torch.float64), "loss": torch.tensor(2.0, dtype=torch.float64)}
    twin = {"stream": wide["stream"] * (1 + 1e-6), "loss": wide["loss"]}
    model_no_worse({"stream": wide["stream"] * (1 - 2e-6), "loss": wide["loss"] + 3e-6}, twin=twin, wide=wide)
    for got in (
        {**twin, "loss": wide["loss"] + 6e-6},
        {**twin, "stream": wide["stream"].roll(1) + torch.eye(64, dtype=torch.float64)[0] * 3e-5},
        {**twin, "stream": wide["stream"] * torch.nan},
        {"stream": twin["stream"]},
    ):
        with pytest.raises(AssertionError):
            model_no_worse(got, twin=twin, wide=wide)
    lost = {**twin, "stream": wide["stream"] * 1.01}
    with pytest.raises(AssertionError, match="the twin is off by"):
        model_no_worse(twin, twin=lost, wide=wide)
    model_no_worse(lost, twin=lost, wide=wide, dtype=torch.bfloat16)
    chosen = {"experts": torch.tensor([0, 1, 2, 3, 1000])}
    swapped = {"experts": torch.tensor([1, 0, 2, 3, 1000])}
    with pytest.raises(AssertionError, match="experts"):
        model_no_worse({**twin, **swapped}, twin={**twin, **chosen}, wide={**wide, **chosen})
    with pytest.raises(AssertionError, match="the twin's experts"):
        model_no_worse({**twin, **chosen}, twin={**twin, **swapped}, wide={**wide, **chosen})
    with pytest.raises(AssertionError, match="stream: off by"):
        model_no_worse({**lost, "stream": wide["stream"] * 1.021}, twin=lost, wide=wide, dtype=torch.bfloat16)


def test_model_no_worse_by_kind() -> None:
    """A value is measured by its own twin, or by what is usual among its kind, and never by another kind."""
    one = torch.ones(64, dtype=torch.float64)
    twin = {"a x": one * 1.01, "b x": one * 1.02, "c x": one, "d x": one * 1.01, "a y": one * 1.05}
    wide = dict.fromkeys(twin, one)

    def compare(**errors: float) -> None:
        got = {what: one * (1 + errors.get(what.replace(" ", "_"), 0.0)) for what in twin}
        model_no_worse(got, twin=twin, wide=wide, dtype=torch.bfloat16, kind_of=lambda what: what[2:])

    compare(a_x=0.0199, b_x=0.0399, c_x=0.0199, a_y=0.099)
    for wrong in ("a_x", "c_x"):
        with pytest.raises(AssertionError, match=f"{wrong.replace('_', ' ')}: off by"):
            compare(**{wrong: 0.0201})


def test_alike_to_zeros_is_zeros() -> None:
    alike(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        alike(torch.full((3,), 1e-30), torch.zeros(3))


def test_no_worse_agrees_on_what_is_not_finite() -> None:
    wide = torch.tensor([math.nan, math.inf, -math.inf, 1e39, 1.0], dtype=torch.float64)
    # 1e39 is infinite in float32.
    twin = wide.to(torch.float32)
    no_worse(twin, twin=twin, wide=wide, magnitude=wide.abs(), k=2.0)
    for index, value in ((0, 1.0), (1, -math.inf), (2, math.nan), (3, 3e38), (4, math.inf)):
        got = twin.clone()
        got[index] = value
        with pytest.raises(AssertionError):
            no_worse(got, twin=twin, wide=wide, magnitude=wide.abs(), k=2.0)


def test_no_worse_refuses_a_negative_magnitude() -> None:
    """It would make the unit of the errors negative, and every error small."""
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="negative"):
        no_worse(one.float(), twin=one.float(), wide=one, magnitude=-one, k=2.0)


def test_roundings_count_half_an_ulp_as_at_most_one() -> None:
    wide = torch.rand(1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1.0
    for dtype in (torch.float32, torch.bfloat16):
        assert roundings(wide.to(dtype), wide, torch.zeros_like(wide)).max() <= 1.0


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_poison_fills_every_allocator(pattern: int, dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, dtype=dtype)
    with poisoned(pattern):
        fresh = (
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (3, 1), dtype=dtype),
            like.new_empty(2, 3),
            like.new_empty_strided((2, 3), (3, 1)),
        )
    for tensor in fresh:
        assert tensor.isnan().all() if tensor.is_floating_point() else (tensor == fresh[0]).all()
        if dtype in (torch.uint8, torch.int8):
            assert (tensor.view(torch.uint8) == pattern).all()
    assert torch.empty(2).dtype == torch.float32 and torch.empty.__name__ == "empty", (
        "poison outlives its block"
    )


class _Ops:
    """An implementation with three faults that only a watched call shows."""

    @staticmethod
    def pack_trits(trits: Tensor) -> Tensor:
        trits += 1
        return trits

    @staticmethod
    def apply_step(weight: TernaryWeight, *, out: TernaryWeight | None = None) -> TernaryWeight:
        return weight

    @staticmethod
    def linear(x: Tensor, weight: TernaryWeight) -> Tensor:
        return torch.empty(x.shape[0], 2)

    from_spec = to_spec = staticmethod(lambda weight: weight)


def test_subject_notices_a_written_input() -> None:
    with pytest.raises(AssertionError, match="wrote to its input"):
        Subject(_Ops, "faulty").pack_trits(torch.zeros(3, dtype=torch.int8))


def test_subject_notices_an_ignored_out() -> None:
    with pytest.raises(AssertionError, match="something else than its `out`"):
        Subject(_Ops, "faulty").apply_step(_weight(), out=_weight())


def test_subject_poisons_outputs() -> None:
    assert Subject(_Ops, "faulty").linear(torch.zeros(3, 13), _weight()).isnan().all()


def test_subject_leaves_out_what_needs_a_missing_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LEDGER, "skipped", {})
    with pytest.raises(pytest.skip.Exception, match="faulty has no op `rms_norm`"):
        Subject(_Ops, "faulty").rms_norm(torch.zeros(3))
    assert LEDGER.skipped == {"laws and vectors of `rms_norm`": "faulty has no op `rms_norm`"}


def test_an_implementation_without_layouts_is_given_weights_as_they_are() -> None:
    ops = SimpleNamespace(dequantize=lambda weight: weight.exponents)
    subject, weight = Subject(ops, "one form"), _weight()
    for device_layout in (False, True):
        got = subject.call_with("dequantize", (weight,), {}, PATTERNS[0], device_layout=device_layout)
        exact(got, weight.exponents)
    exact(subject.to_spec(weight), weight)


class _Opaque:
    """A weight in a form that shows neither a size nor a tensor."""

    def __init__(self, weight: TernaryWeight) -> None:
        self.hidden = {name: tensor.numpy().copy() for name, tensor in weight.tensors().items()}
        self.plain = weight

    def canonical(self) -> TernaryWeight:
        return self.plain.with_tensors(
            **{name: torch.from_numpy(array.copy()) for name, array in self.hidden.items()}
        )


def test_a_form_of_weights_may_be_any_class() -> None:
    """It is read back in canonical form, and an op that writes to it or returns the other form is noticed."""

    def apply_step(weight: Any) -> Any:
        return _Opaque(reference_ops.apply_step(weight.canonical()))

    def dequantize(weight: Any) -> Tensor:
        weight.hidden["exponents"] += 1
        return torch.zeros(1)

    ops = SimpleNamespace(
        from_spec=_Opaque, to_spec=_Opaque.canonical, apply_step=apply_step, dequantize=dequantize
    )
    subject, weight = Subject(ops, "opaque"), _weight()
    in_its_form = {"pattern": PATTERNS[0], "device_layout": True}
    exact(subject.call_with("from_spec", (weight,), {}, PATTERNS[0], device_layout=False), weight)
    exact(
        subject.call_with("apply_step", (weight,), {}, **in_its_form),
        reference_ops.apply_step(weight),
    )
    with pytest.raises(AssertionError, match="dequantize wrote to its input"):
        subject.call_with("dequantize", (weight,), {}, **in_its_form)
    ops.apply_step = lambda weight: weight.canonical()
    with pytest.raises(AssertionError, match="was given a _Opaque and returned a TernaryWeight"):
        subject.call_with("apply_step", (weight,), {}, **in_its_form)


def test_a_maker_may_return_the_form_of_its_implementation() -> None:
    weight = _weight()
    ops = SimpleNamespace(
        from_spec=_Opaque, to_spec=_Opaque.canonical, constant_weight=lambda **_: _Opaque(weight)
    )
    exact(Subject(ops, "opaque").constant_weight(), weight)


def test_a_tensor_is_no_form_of_weights() -> None:
    subject = Subject(SimpleNamespace(from_spec=lambda weight: weight.packed, to_spec=None), "a tensor")
    subject.call_with("from_spec", (_weight(),), {}, PATTERNS[0], device_layout=False)
    assert subject.forms == (TernaryWeight,)


def test_half_of_a_layout_is_a_missing_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LEDGER, "skipped", {})
    half = Subject(SimpleNamespace(from_spec=lambda weight: weight), "half a layout")
    assert half.has("from_spec") and not half.has("to_spec")
    with pytest.raises(pytest.skip.Exception, match="half a layout has no op `to_spec`"):
        half.to_spec(_weight())


def test_no_other_tolerance_for_tensors_exists() -> None:
    """Tensors are compared by the comparers alone: a tolerance of a test's own is chosen to let the test pass."""
    others = {"allclose", "isclose", "assert_close", "assert_allclose"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in sorted((ROOT / "conformance").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in others
    ]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def of_module() -> Tensor:
    return torch.rand(4)


@pytest.fixture
def of_test(of_module: Tensor) -> Tensor:
    return torch.rand(4)


@pytest.mark.parametrize("time", ["first", "second"])
def test_what_is_drawn_depends_on_no_draw_before(time: str, of_module: Tensor, of_test: Tensor) -> None:
    """In whatever order tests and fixtures run, alone or in company, torch's generator gives them the same numbers."""
    for drawn in (of_module, of_test, torch.rand(4)):
        exact(drawn, torch.rand(4, generator=torch.Generator().manual_seed(0)))
