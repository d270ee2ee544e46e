"""Implementations that are broken on purpose, and the laws that must notice.

A mutant is the reference with one piece of its text exchanged: what a wrong kernel would compute. `rejected_by` names the laws
that fail on it; the comparison of `compared` with the reference fails too, unless the mutant cannot show there, which then
is said. A law that rejects no mutant has no business in the suite: test_mutants.py sees to that.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import arbitor.reference.ops as reference_ops

PACKAGE = "arbitor.reference.ops"


@dataclass(frozen=True)
class Mutant:
    """One broken implementation: in `file`.py of the reference's ops, `old` (found once) is exchanged for `new`."""

    name: str
    file: str
    old: str
    new: str
    rejected_by: tuple[str, ...]
    compared: tuple[str, ...] = ()
    times: int = 1


def build(mutant: Mutant) -> ModuleType:
    """Return the ops of a mutant: the reference's sources, patched, imported under a name of their own."""
    package = f"mutant_{mutant.name}"
    folder = Path(reference_ops.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / package
        copy.mkdir()
        for source in folder.glob("*.py"):
            text = source.read_text()
            if source.stem == mutant.file:
                found = text.count(mutant.old)
                assert found == mutant.times, (
                    f"{mutant.name}: `{mutant.old}` is {found} times in {source.name}"
                )
                text = text.replace(mutant.old, mutant.new)
            (copy / source.name).write_text(text.replace(PACKAGE, package))
        sys.path.insert(0, temporary)
        writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            importlib.invalidate_caches()
            return importlib.import_module(package)
        finally:
            sys.path.remove(temporary)
            sys.dont_write_bytecode = writes_bytecode
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                del sys.modules[name]


def _m(
    name: str, file: str, old: str, new: str, *laws: str, compared: tuple[str, ...] | str = (), times: int = 1
) -> Mutant:
    ops = (compared,) if isinstance(compared, str) else compared
    return Mutant(name, file, old, new, tuple(f"test_{law}" for law in laws), ops, times)


# fmt: off
_PACKING = (
    _m("pack_most_significant_first", "packing", "(digits.reshape(-1, TRITS_PER_BYTE) * places)",
       "(digits.reshape(-1, TRITS_PER_BYTE) * places.flip(0))",
       "pack_trits_roundtrip", "pack_trits_by_long_division", compared="pack_trits"),
    _m("unpack_most_significant_first", "packing", "places[positions % TRITS_PER_BYTE]",
       "places.flip(0)[positions % TRITS_PER_BYTE]",
       "unpack_trits_roundtrip", "unpack_trits_by_long_division", "dequantize_by_fractions", compared="unpack_trits"),
    _m("both_most_significant_first", "packing", "[3**j for j in range(TRITS_PER_BYTE)]",
       "[3 ** (4 - j) for j in range(TRITS_PER_BYTE)]",
       "pack_trits_by_long_division", "unpack_trits_by_long_division", compared="pack_trits", times=2),
    _m("pad_with_minus_one", "packing", "digits.new_ones(padding)", "digits.new_zeros(padding)",
       "pack_trits_by_long_division", "pack_trits_negation", compared="pack_trits"),
    _m("pack_drops_the_tail", "packing", "digits = torch.cat([digits, digits.new_ones(padding)])",
       "digits = torch.cat([digits[: 5 * (digits.numel() // 5)], digits.new_ones((padding > 0) * 5)])",
       "pack_trits_roundtrip", "pack_trits_by_long_division", compared="pack_trits"),
    _m("pack_in_memory_order", "packing", "digits = trits.reshape(-1)",
       "digits = trits.as_strided((trits.numel(),), (1,), trits.storage_offset())",
       "pack_trits_ignores_memory_layout"),
    _m("pack_accepts_two", "packing", 'checks.values_between("trits", trits, -1, 1)', "pass", "refusals_of_packing"),
    _m("unpack_accepts_243", "packing", "packed, 0, MAX_PACKED_BYTE)", "packed, 0, 243)", "refusals_of_packing"),
)

_DITHER = (
    _m("nine_rounds", "dither", "PHILOX_ROUNDS = 10", "PHILOX_ROUNDS = 9",
       "dither_bytes_by_scalar_philox", compared="dither_bytes"),
    _m("key_words_swapped", "dither", "key = (seed & _WORD, seed >> 32)", "key = (seed >> 32, seed & _WORD)",
       "dither_bytes_by_scalar_philox", compared="dither_bytes"),
    _m("big_endian_words", "dither", "(0, 8, 16, 24)", "(24, 16, 8, 0)",
       "dither_bytes_by_scalar_philox", compared=("dither_bytes", "stochastic_votes")),
    _m("step_and_tensor_swapped", "dither", "step_word, tensor_word)", "tensor_word, step_word)",
       "dither_bytes_by_scalar_philox", compared="dither_bytes"),
    _m("tensor_id_ignored", "dither", "torch.full_like(group_ids, tensor_id)", "torch.zeros_like(group_ids)",
       "dither_bytes_depend_on_every_coordinate", compared="dither_bytes"),
    _m("high_seed_ignored", "dither", "seed >> 32)", "0)",
       "dither_bytes_depend_on_every_coordinate", compared="dither_bytes"),
    _m("step_tensor_ignored", "dither", "torch.as_tensor(step, device=group_ids.device)",
       "torch.as_tensor(0 if isinstance(step, torch.Tensor) else step, device=group_ids.device)",
       "dither_bytes_step_as_a_tensor", "stochastic_votes_take_device_scalars",
       compared="dither_bytes"),
    _m("ids_by_position", "dither", "words = philox((group_ids,",
       "words = philox((torch.arange(group_ids.numel()).reshape(group_ids.shape),",
       "dither_bytes_group_locality", compared="dither_bytes"),
    _m("one_block_repeated", "dither", "torch.full_like(group_ids, block)", "torch.zeros_like(group_ids)",
       "dither_bytes_by_scalar_philox", compared="dither_bytes"),
    _m("exponent_byte_first", "dither", "torch.stack(blocks[: group_size + 1], dim=-1)",
       "torch.stack(blocks[1 : group_size + 1] + blocks[:1], dim=-1)",
       "dither_bytes_by_scalar_philox", "dither_bytes_of_a_larger_group_continue", compared="dither_bytes"),
    _m("seed_unchecked", "dither", "checks.vote_clock(seed, step, tensor_id, last_step=RESERVED_STEP)", "pass",
       "refusals_of_dither_and_scale"),
)

_SCALE = (
    _m("mantissa_ignored", "scale", "torch.ldexp(1.0 + mantissa.to(torch.float32) / 2**mantissa_bits, exponent)",
       "torch.ldexp(torch.ones(exponent.shape), exponent)",
       "group_scales_by_fractions", "dequantize_by_fractions", compared=("group_scales", "dequantize")),
    _m("truncated_exponent", "scale", "exponent = level >> mantissa_bits",
       "exponent = torch.div(level, 2**mantissa_bits, rounding_mode='trunc').to(torch.int32)",
       "group_scales_by_fractions", compared="group_scales"),
    _m("groups_across_rows", "scale", "scales[:, columns // weight.group_size]",
       "group_scales(weight.exponents.reshape(-1), mantissa_bits=weight.mantissa_bits)"
       "[(rows[:, None] * num_columns + columns) // weight.group_size]",
       "dequantize_by_fractions", compared="dequantize"),
    _m("rows_in_order", "scale", "trits = digits_at(weight.packed, rows[:, None]",
       "trits = digits_at(weight.packed, rows.sort().values[:, None]",
       "dequantize_some_rows", "embedding_by_row", compared="embedding"),
    _m("init_signs_leave_no_zero", "scale", "(places >= INIT_HIGH_BYTE)", "(places >= INIT_LOW_BYTE)",
       "initial_weight_by_scalar_philox", "initial_weight_statistics", compared="initial_weight"),
    _m("init_exponent_floor", "scale", "round(math.log2(", "math.floor(math.log2(",
       "initial_weight_by_scalar_philox", compared="initial_weight"),
    _m("init_ids_from_the_end", "scale", "ids = torch.arange(num_rows * groups, device=device)",
       "ids = torch.arange(num_rows * groups - 1, -1, -1)",
       "initial_weight_rows_are_local", "initial_weight_by_scalar_philox", compared="initial_weight"),
    _m("constant_of_one_sign", "scale", "torch.full((num_rows, num_columns), trit,",
       "torch.full((num_rows, num_columns), abs(trit),",
       "constant_weight_is_constant", compared="constant_weight"),
)

_VOTES = (
    _m("rms_over_padded_columns", "votes", ".square().mean(dim=1)",
       ".square().sum(dim=1) / (-(-grad_NK.shape[1] // 12) * 12)",
       "row_exponents_by_fractions", compared=("row_exponents", "stochastic_votes")),
    _m("sum_for_mean", "votes", ".square().mean(dim=1)", ".square().sum(dim=1)",
       "row_exponents_by_fractions", compared="row_exponents"),
    _m("largest_for_rms", "votes", ".square().mean(dim=1)", ".square().amax(dim=1)",
       "row_exponents_by_fractions", compared="row_exponents"),
    _m("exponent_of_half", "votes", "frexp_exponent.div(2, rounding_mode=\"floor\")",
       "frexp_exponent.div(2, rounding_mode=\"trunc\")",
       "row_exponents_by_fractions", "row_exponents_follow_the_scale",
       compared="row_exponents"),
    _m("float32_squares", "votes", "grad_NK.to(torch.float64).square()", "grad_NK.to(torch.float32).square()",
       "row_exponents_by_fractions", compared="row_exponents"),
    _m("first_column_left_out", "votes", "grad_NK.to(torch.float64).square()",
       "(grad_NK.to(torch.float64) * (torch.arange(grad_NK.shape[1]) > 0)).square()",
       "row_exponents_follow_the_scale", compared="row_exponents"),
    _m("infinite_rows_vote", "votes", "votes = mean_square.isfinite() &", "votes =",
       "row_exponents_by_fractions", compared=("row_exponents",)),
    _m("a_bad_row_silences_all", "votes", "votes = mean_square.isfinite() &",
       "votes = mean_square.isfinite().all() &",
       "stochastic_votes_of_silent_rows", compared="stochastic_votes"),
    _m("votes_for_nan", "votes", "torch.where(votes, frexp_exponent", "torch.where(votes | True, frexp_exponent",
       "stochastic_votes_of_silent_rows", "row_exponents_by_fractions", compared=("row_exponents",)),
    _m("truncated_quotient", "votes", ".clamp(-32768.0, 32767.0).round()", ".clamp(-32768.0, 32767.0).trunc()",
       "stochastic_votes_by_fractions", compared="stochastic_votes"),
    _m("half_up", "votes", ".clamp(-32768.0, 32767.0).round()", ".clamp(-32768.0, 32767.0).add(0.5).floor()",
       "stochastic_votes_round_half_to_even"),  # one tie in 256 shows: a comparison seldom meets it
    _m("floored_quotient", "votes", ".clamp(-32768.0, 32767.0).round()", ".clamp(-32768.0, 32767.0).floor()",
       "stochastic_votes_by_fractions", compared="stochastic_votes"),
    _m("two_roundings", "votes", "device=grad_NK.device).to(torch.float64)\n",
       "device=grad_NK.device).to(torch.bfloat16).to(torch.float64)\n",
       "stochastic_votes_by_fractions", compared="stochastic_votes"),
    _m("signed_dither", "votes", "(quotient + dither_NK)", "(quotient + dither_NK.view(torch.int8))",
       "stochastic_votes_by_fractions", "stochastic_votes_are_unbiased",
       compared="stochastic_votes"),
    _m("no_dither", "votes", "(quotient + dither_NK)", "(quotient + 128)",
       "stochastic_votes_are_unbiased", "stochastic_votes_differ_between_steps", "stochastic_votes_by_fractions",
       compared="stochastic_votes"),
    _m("dither_at_rate_zero", "votes", "(quotient + dither_NK)", "(quotient + dither_NK + 1)",
       "stochastic_votes_at_rate_zero", "accumulate_gradient_at_rate_zero", "stochastic_votes_are_unbiased",
       compared="stochastic_votes"),
    _m("logical_shift", "votes", "((quotient + dither_NK) >> 8)", "(((quotient + dither_NK).to(torch.int64) & 0xFFFFFFFF) >> 8)",
       "stochastic_votes_are_unbiased", "stochastic_votes_by_fractions", compared="stochastic_votes"),
    _m("votes_wrap", "votes", ".clamp(-ACCUM_MAX, ACCUM_MAX)\n    return votes", "\n    return votes",
       "stochastic_votes_saturate", compared="stochastic_votes"),
    _m("a_vote_of_minus_128", "votes", ".clamp(-ACCUM_MAX, ACCUM_MAX)\n    return votes",
       ".clamp(-ACCUM_MAX - 1, ACCUM_MAX)\n    return votes",
       "stochastic_votes_saturate", compared="stochastic_votes"),
    _m("no_row_scale", "votes", "(8 - row_exponent)[:, None]", "(8 - 0 * row_exponent)[:, None]",
       "stochastic_votes_ignore_the_scale", "stochastic_votes_by_fractions", compared="stochastic_votes"),
    _m("rows_by_slot", "votes", "rows.clamp(min=0)[:, None] * groups", "torch.arange(num_rows)[:, None] * groups",
       "stochastic_votes_of_some_rows", compared="stochastic_votes"),
    _m("unused_slots_vote", "votes", "(row_exponent != SILENT_ROW) & (rows >= 0)", "(row_exponent != SILENT_ROW)",
       "stochastic_votes_of_some_rows", compared="stochastic_votes"),
    _m("ascent", "votes", "return votes.to(torch.int8)", "return -votes.to(torch.int8)",
       "update_descends", "stochastic_votes_are_unbiased", "stochastic_votes_by_fractions",
       "stochastic_votes_never_oppose", "linear_backward_votes_disagree_only_at_boundaries", compared="stochastic_votes"),
    _m("rate_tensor_ignored", "votes", "torch.as_tensor(rate, dtype=torch.float32, device=grad_NK.device)",
       "torch.as_tensor(1.0 if isinstance(rate, torch.Tensor) else rate, dtype=torch.float32)",
       "stochastic_votes_take_device_scalars", compared="stochastic_votes"),
    _m("sign_of_zero", "votes", "torch.sign(grad_NK) * step_size", "(2.0 * (grad_NK > 0) - 1) * step_size",
       "sign_votes_by_sign", "sign_votes_negation", compared="sign_votes"),
    _m("sign_votes_for_nan", "votes", "finite = grad_NK.isfinite().all(dim=1, keepdim=True)",
       "finite = grad_NK.isfinite()", "sign_votes_by_sign", compared="sign_votes"),
    _m("step_floor", "votes", "math.ceil(min(", "math.floor(min(",
       "step_from_loss_by_ceiling", compared="step_from_loss"),
    _m("rate_unchecked", "votes", "checks.vote_rate(rate)", "pass", "refusals_of_votes", "refusals_of_update"),
)

_UPDATE = (
    _m("accumulate_wraps", "update", "count.clamp(-ACCUM_MAX, ACCUM_MAX).to(torch.int8)", "count.to(torch.int8)",
       "accumulate_saturates", "accumulate_by_element", compared="accumulate"),
    _m("accumulate_to_minus_128", "update", "count.clamp(-ACCUM_MAX, ACCUM_MAX)", "count.clamp(-128, ACCUM_MAX)",
       "accumulate_saturates", "accumulate_by_element", compared="accumulate"),
    _m("accumulate_replaces", "update", "_saturate(trit_accum[rows].to(torch.int16) + votes_NK)",
       "_saturate(0 * trit_accum[rows].to(torch.int16) + votes_NK)",
       "accumulate_by_element", "accumulate_of_no_votes", compared="accumulate"),
    _m("score_after_the_flip", "update", "votes_NK.to(torch.int32) * weight.trits()[rows]",
       "votes_NK.to(torch.int32) * (weight.trits()[rows] - (trit_accum[rows] >= DEFAULT_THETA).to(torch.int8)"
       " + (trit_accum[rows] <= -DEFAULT_THETA).to(torch.int8)).clamp(-1, 1)",
       "accumulate_by_element", compared="accumulate"),
    _m("score_without_trits", "update", "votes_NK.to(torch.int32) * weight.trits()[rows]", "votes_NK.to(torch.int32)",
       "accumulate_by_element", "update_descends", compared="accumulate"),
    _m("score_drops_the_tail", "update", "score = padded.reshape(-1, groups, weight.group_size).sum(dim=2)",
       "score = padded.reshape(-1, groups, weight.group_size)[..., : weight.group_size - 1].sum(dim=2)",
       "accumulate_by_element", "accumulate_exponent_is_unbiased", compared="accumulate"),
    _m("score_dither_too_wide", "update", ">> (8 - SCORE_SHIFT)", ">> (7 - SCORE_SHIFT)",
       "accumulate_exponent_is_unbiased", "accumulate_of_no_votes", compared="accumulate"),
    _m("score_dither_of_a_place", "update", "dither[..., weight.group_size]", "dither[..., weight.group_size - 1]",
       "accumulate_by_element", compared="accumulate"),
    _m("score_truncated", "update", "(score + exponent_dither) >> SCORE_SHIFT",
       "torch.div(score + exponent_dither, 8, rounding_mode='trunc')",
       "accumulate_exponent_is_unbiased", "accumulate_by_element", compared="accumulate"),
    _m("frozen_exponents_count", "update", 'if exponent_rule != "frozen":', "if True:",
       "accumulate_moves_no_weight", compared="accumulate"),
    _m("accumulate_flips_at_once", "update", "weight.with_tensors(trit_accum=trit_accum,",
       "weight.with_tensors(packed=pack_trits((weight.trits() - (trit_accum == 127).to(torch.int8)).clamp(-1, 1)),"
       " trit_accum=trit_accum,",
       "accumulate_moves_no_weight", compared="accumulate"),
    _m("all_rows_at_once", "update", "group_ids = rows[:, None] * groups",
       "group_ids = torch.arange(rows.numel())[:, None] * groups",
       "accumulate_some_rows", compared="accumulate"),
    _m("stale_rows", "update", "trit_accum = weight.trit_accum.clone()", "trit_accum = weight.trit_accum * 0",
       "accumulate_some_rows", compared="accumulate", times=1),
    _m("exponents_ascend", "update", "exponents[rows].to(torch.int16) - full", "exponents[rows].to(torch.int16) + full",
       "apply_step_by_element", "update_descends", compared="apply_step"),
    _m("trits_ascend", "update", "(trits[rows] - full)", "(trits[rows] + full)",
       "apply_step_by_element", "update_descends", compared="apply_step"),
    _m("theta_strict", "update", "full = (count >= theta).to(torch.int16) - (count <= -theta)",
       "full = (count > theta).to(torch.int16) - (count < -theta)",
       "apply_step_by_element", "apply_step_carries_the_excess", compared="apply_step"),
    _m("two_levels", "update", "(trits[rows] - full).clamp(-1, 1)", "(trits[rows] - 2 * full).clamp(-1, 1)",
       "apply_step_by_element", compared="apply_step"),
    _m("trits_wrap", "update", "(trits[rows] - full).clamp(-1, 1)", "((trits[rows] - full + 4) % 3 - 1)",
       "apply_step_holds_the_rails", "apply_step_by_element", compared="apply_step"),
    _m("exponent_rail_of_int8", "update", ".clamp(low, high)", ".clamp(-128, 127)",
       "apply_step_holds_the_rails", "apply_step_by_element", compared="apply_step"),
    _m("rail_without_mantissa", "update", "level_range(weight.mantissa_bits)", "level_range(0)",
       "apply_step_holds_the_rails", "apply_step_by_element", compared="apply_step"),
    _m("missing_carry", "update", "else count - full * theta\n", "else torch.zeros_like(count)\n",
       "apply_step_carries_the_excess", compared="apply_step"),
    _m("reset_carries", "update", "torch.zeros_like(count) if on_flip == \"reset\" else count - full * theta",
       "count - full * theta",
       "apply_step_is_idle_the_second_time", "apply_step_by_element", compared="apply_step"),
    _m("exponents_reset", "update", "(count - full * theta_e)", "torch.where(full != 0, 0, count)",
       "apply_step_by_element", compared="apply_step"),
    _m("exponent_count_kept", "update", "(count - full * theta_e)", "count",
       "apply_step_is_idle_the_second_time", compared="apply_step"),
    _m("step_clears_all_counts", "update", "torch.where(full != 0, kept, count)", "kept",
       "apply_step_by_element", compared="apply_step"),
    _m("step_moves_every_row", "update", "    (rows,) = _used_rows(weight, rows)", "    (rows,) = _used_rows(weight, None)",
       "apply_step_some_rows", "embedding_update_is_the_dense_update", compared="apply_step"),
    _m("out_keeps_its_trits", "update", "        tensor.copy_(result.tensors()[name])",
       "        tensor.copy_(result.tensors()[name]) if name != 'packed' else None",
       "update_in_place", compared="apply_step"),
    _m("out_is_ignored", "update", "    if out is None:\n        return result", "    if True:\n        return result",
       "update_in_place", compared="apply_step"),
    _m("writes_its_input", "update", "trit_accum = weight.trit_accum.clone()", "trit_accum = weight.trit_accum",
       "accumulate_moves_no_weight", "accumulate_by_element", compared="accumulate"),
    _m("fused_forgets_rows", "update", "exponent_rule=exponent_rule,\n        rows=rows,\n        out=out",
       "exponent_rule=\"score\",\n        rows=rows,\n        out=out",
       "accumulate_gradient_is_its_parts", compared="accumulate_gradient"),
    _m("faults_not_counted", "update", "faults += count_nonfinite_rows(grad_NK)", "pass",
       "accumulate_gradient_counts_faults", compared="accumulate_gradient"),
    _m("faults_by_element", "update", "(~grad_NK.isfinite().all(dim=1)).sum()", "(~grad_NK.isfinite()).sum()",
       "count_nonfinite_rows_by_row", compared="count_nonfinite_rows"),
    _m("faults_without_infinity", "update", "(~grad_NK.isfinite().all(dim=1)).sum()", "grad_NK.isnan().any(dim=1).sum()",
       "count_nonfinite_rows_by_row", "accumulate_gradient_counts_faults", compared="count_nonfinite_rows"),
    _m("changed_bytes_for_trits", "update",
       "(unpack_trits(before.packed, before.shape) != unpack_trits(after.packed, after.shape)).sum()",
       "(before.packed != after.packed).sum()",
       "count_changed_trits_by_trit", compared="count_changed_trits"),
    _m("theta_unchecked", "update", 'checks.threshold("theta", theta)', "pass", "refusals_of_update"),
    _m("rows_unchecked", "update", "checks.row_values(rows, weight.shape[0])", "pass", "refusals_of_update", times=3),
    _m("counts_before_it_refuses", "update", "    votes = stochastic_votes(",
       "    if faults is not None:\n        faults += 1\n    votes = stochastic_votes(",
       "refusals_of_update", "accumulate_gradient_counts_faults", compared="accumulate_gradient"),
    _m("reserved_step_votes", "votes", "checks.vote_clock(seed, step, tensor_id)", "pass", "refusals_of_votes"),
)

_FORWARD = "return (x.to(wide) @ dequantize(weight, dtype=wide).T).to(x.dtype)"
_FLOATS = (
    _m("transposed_weight", "linear", _FORWARD,
       "return x @ dequantize(weight, dtype=x.dtype).reshape(weight.shape[1], weight.shape[0])",
       "linear_permutation", "linear_by_exact_sums", "linear_adjoint", compared="linear"),
    _m("sums_in_bfloat16", "linear", _FORWARD,
       "w = dequantize(weight, dtype=x.dtype)\n"
       "    y = x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)\n"
       "    for k in range(weight.shape[1]):\n"
       "        y = y + (x[..., k, None] * w[:, k]).to(torch.bfloat16)\n"
       "    return y.to(x.dtype)",
       "linear_by_exact_sums", compared="linear"),
    _m("last_column_dropped", "linear", _FORWARD,
       "return x[..., :-1] @ dequantize(weight, dtype=x.dtype)[:, :-1].T",
       "linear_by_exact_sums", "linear_adjoint", compared="linear"),
    _m("magnitudes_only", "linear", _FORWARD,
       "return x @ dequantize(weight, dtype=x.dtype).abs().T",
       "linear_negation", compared="linear"),
    _m("saturating_output", "linear", _FORWARD,
       "return (x @ dequantize(weight, dtype=x.dtype).T).clamp(-2.0, 2.0)",
       "linear_is_linear", compared="linear"),
    _m("zero_skips_nan", "linear", _FORWARD,
       "return torch.nan_to_num(x) @ dequantize(weight, dtype=x.dtype).T",
       "linear_rows_are_independent"),
    _m("mean_over_the_batch", "linear", _FORWARD,
       "return (x - 0.5 * x.reshape(-1, x.shape[-1])[:1]) @ dequantize(weight, dtype=x.dtype).T",
       "linear_rows_are_independent"),
    _m("empty_batch_of_one", "linear", "return grad_MN.T @ x_MK",
       "return grad_MN.T @ x_MK if x_MK.shape[0] else x_MK.new_ones(grad.shape[-1], x.shape[-1])",
       "linear_of_an_empty_batch", compared="linear_weight_grad"),
    _m("input_grad_of_the_forward", "linear", "(grad.to(wide) @ dequantize(weight, dtype=wide))",
       "(grad.to(wide) @ dequantize(weight, dtype=wide).abs())",
       "linear_adjoint", "linear_by_exact_sums", compared="linear_input_grad"),
    _m("weight_grad_of_the_last_row", "linear", "return grad_MN.T @ x_MK", "return grad_MN[-1:].T @ x_MK[-1:]",
       "linear_weight_grad_by_exact_sums", "linear_adjoint", compared="linear_weight_grad"),
    _m("weight_grad_in_bfloat16", "linear", "return grad_MN.T @ x_MK",
       "return (grad_MN.T @ x_MK).to(torch.bfloat16).to(dtype)",
       "linear_weight_grad_by_exact_sums", "linear_backward_votes_disagree_only_at_boundaries",
       compared="linear_weight_grad"),
    _m("weight_grad_unwritten", "linear", "return grad_MN.T @ x_MK",
       "out = torch.empty(grad.shape[-1], x.shape[-1], dtype=dtype)\n"
       "    out[:, :64] = (grad_MN.T @ x_MK)[:, :64]\n    return out",
       "linear_weight_grad_by_exact_sums", compared="linear_weight_grad"),
    _m("conv_stride_tail", "conv", "windows_BCPJ = padded.unfold(2, kernel_size, stride)",
       "windows_BCPJ = padded.unfold(2, kernel_size, stride).clone()\n    windows_BCPJ[:, :, -1] = 0",
       "conv1d_by_torch", compared="conv1d"),
    _m("conv_flipped_taps", "conv", "windows_BCPJ = padded.unfold(2, kernel_size, stride)",
       "windows_BCPJ = padded.unfold(2, kernel_size, stride).flip(3)",
       "conv1d_by_torch", compared="conv1d"),
    _m("conv_taps_before_channels", "conv", "windows_BCPJ.permute(0, 2, 1, 3)", "windows_BCPJ.permute(0, 2, 3, 1)",
       "conv1d_by_torch", compared="conv1d"),
    _m("conv_batch_reversed", "conv", "windows_BCPJ.permute(0, 2, 1, 3)", "windows_BCPJ.flip(2).permute(0, 2, 1, 3)",
       "conv1d_of_one_tap_is_linear", compared="conv1d"),
    _m("conv_padding_kept", "conv", "padded[:, :, padding : padding + length]", "padded[:, :, :length]",
       "conv1d_by_torch", compared="conv1d_input_grad"),
    _m("conv_batch_guessed", "conv", "windows_BCPJ.shape[2], num_columns)", "windows_BCPJ.shape[2], -1)",
       "conv1d_of_an_empty_batch"),
    _m("conv_padding_unchecked", "conv", "checks.conv_input(x_BCL, num_columns, kernel_size)", "pass",
       "refusals_of_linear_and_conv"),
    _m("eps_outside_the_root", "norm", "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
       "x_wide.square().mean(dim=-1, keepdim=True).sqrt() + eps",
       "rms_norm_by_torch", compared="rms_norm"),
    _m("norm_of_the_sum", "norm", "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
       "(x_wide.square().sum(dim=-1, keepdim=True) + eps).sqrt()",
       "rms_norm_by_torch", compared=("rms_norm", "rms_norm_weight_grad")),
    _m("norm_forgets_the_root", "norm", "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
       "(x_wide.square().mean(dim=-1, keepdim=True) + eps)",
       "rms_norm_weight_grad_ignores_the_scale", "rms_norm_ignores_the_scale", compared="rms_norm"),
    _m("norm_without_eps", "norm", "(x_wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
       "x_wide.square().mean(dim=-1, keepdim=True).sqrt()",
       "rms_norm_of_zeros"),
    _m("norm_grad_without_projection", "norm", "unit * (unit * scaled).mean(dim=-1, keepdim=True)", "0",
       "rms_norm_input_grad_is_orthogonal", "rms_norm_by_torch", compared="rms_norm_input_grad"),
    _m("norm_weight_grad_rectified", "norm", "reshape(-1, x.shape[-1]).sum(dim=0", "reshape(-1, x.shape[-1]).relu().sum(dim=0",
       "rms_norm_weight_grad_scales_with_grad", compared="rms_norm_weight_grad"),
    _m("norm_eps_unchecked", "norm", 'checks.number("eps", eps, 0.0, 1.0, open_low=True)', "pass",
       "refusals_of_norm_embedding_denoise"),
    _m("duplicates_keep_the_last", "embedding",
       "sums.index_add_(0, slots, grad.reshape(-1, grad.shape[-1]).to(torch.float64))",
       "sums[slots] = grad.reshape(-1, grad.shape[-1]).to(torch.float64)",
       "embedding_row_grads_by_row", "embedding_row_grads_ignore_the_order", "embedding_update_is_the_dense_update",
       compared="embedding_row_grads"),
    _m("duplicates_averaged", "embedding", "return rows, sums.to(",
       "return rows, (sums / slots.bincount(minlength=max(1, ids.numel()))[: ids.numel(), None].clamp(min=1)).to(",
       "embedding_row_grads_by_row", compared="embedding_row_grads"),
    _m("unused_slots_are_row_zero", "embedding", "(ids.numel(),), -1,", "(ids.numel(),), 0,",
       "embedding_row_grads_by_row", compared="embedding_row_grads"),
    _m("embedding_by_position", "embedding", "rows=ids.reshape(-1)", "rows=ids.reshape(-1).sort().values",
       "embedding_by_row", compared="embedding"),
    _m("denoise_sign", "denoise", "latent.to(dtype) - (1.0 - alpha)", "latent.to(dtype) + (1.0 - alpha)",
       "denoise_step_by_hand", "denoise_step_adjoint", compared="denoise_step"),
    _m("denoise_without_root", "denoise", "pred.to(dtype)) / math.sqrt(alpha)", "pred.to(dtype)) / alpha",
       "denoise_step_by_hand", compared="denoise_step"),
    _m("denoise_alpha_for_its_rest", "denoise", "latent.to(dtype) - (1.0 - alpha)", "latent.to(dtype) - alpha",
       "denoise_step_at_one", compared="denoise_step"),
    _m("denoise_backward_sign", "denoise", "factor = -(1.0 - alpha)", "factor = (1.0 - alpha)",
       "denoise_step_adjoint", compared="denoise_step_backward"),
    _m("layout_forgets_residues", "layout", "def to_spec(weight: TernaryWeight) -> TernaryWeight:",
       "def to_spec(weight: TernaryWeight) -> TernaryWeight:\n"
       "    return weight.with_tensors(exponent_accum=weight.exponent_accum * 0)\n\n\n"
       "def _unused(weight: TernaryWeight) -> TernaryWeight:",
       "layout_roundtrip", compared="to_spec"),
    _m("layout_negates", "layout", "def from_spec(weight: TernaryWeight) -> TernaryWeight:",
       "def from_spec(weight: TernaryWeight) -> TernaryWeight:\n"
       "    return weight.with_tensors(exponents=weight.exponents.clamp(max=14))\n\n\n"
       "def _unused(weight: TernaryWeight) -> TernaryWeight:",
       "layout_does_not_show", "layout_roundtrip", compared="from_spec"),
)
# fmt: on

MUTANTS = (*_PACKING, *_DITHER, *_SCALE, *_VOTES, *_UPDATE, *_FLOATS)
"""Every broken implementation."""
