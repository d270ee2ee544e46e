"""Broken implementations of the family memory."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant, m

# fmt: off
_ROWS = (
    m("newest_code_first", "memory", "c = all_codes[:, place : place + positions]",
       "c = all_codes[:, order - 1 - place : order - 1 - place + positions]",
       "ngram_rows_by_integers", compared="ngram_rows"),
    m("ngrams_look_ahead", "memory", "all_codes = torch.cat([before, codes_BP], dim=1)",
       "all_codes = torch.cat([before, codes_BP], dim=1)\n    all_codes = all_codes.roll(-1, dims=1) if order > 1 else all_codes",
       "ngram_rows_by_integers", "ngram_rows_go_on", compared="ngram_rows"),
    m("previous_ignored", "memory", "if previous is None else previous", "if True else previous",
       "ngram_rows_go_on", "ngram_rows_by_integers", compared="ngram_rows"),
    m("previous_counts_from_its_start", "memory", "    batch, positions = codes_BP.shape\n",
       "    batch, positions = codes_BP.shape\n    previous = None if previous is None else previous.flip(1)\n",
       "ngram_rows_go_on", "ngram_rows_by_integers", compared="ngram_rows"),
    m("missing_codes_have_a_row", "memory", "known &= c >= 0", "known &= True",
       "ngram_rows_by_integers", compared="ngram_rows"),
    m("no_ngram_is_row_0", "memory", "torch.where(known, h % num_rows, -1)", "torch.where(known, h % num_rows, 0)",
       "ngram_rows_by_integers", compared="ngram_rows"),
    m("products_wrap_late", "memory", "* factor) & _WORD", "* factor)", "ngram_rows_by_integers", compared="ngram_rows"),
    m("salt_ignored", "memory", "torch.full_like(codes_BP, salt)", "torch.full_like(codes_BP, 0)",
       "ngram_rows_are_spread", "ngram_rows_by_integers", compared="ngram_rows"),
    m("codes_added_up", "memory", "h = mix(((h + CODE_STEP) & _WORD) ^ (c & _WORD))",
       "h = (h + (order - place) * c) & _WORD", "ngram_rows_are_spread", compared="ngram_rows"),
    m("ngram_order_unchecked", "memory", "checks.ngrams(codes_BP, order, num_rows, salt, previous)", "pass",
       "refusals_of_experts_attention_memory"),
)

_STRENGTHS = (
    m("small_strengths_stay", "memory", "(touched[decaying] + 2**shift - 1) >> shift", "touched[decaying] >> shift",
       "touch_strengths_reach_zero", "touch_strengths_one_by_one", compared="touch_strengths"),
    m("strengths_halve_upwards", "memory", "(touched[decaying] + 2**shift - 1) >> shift", "(touched[decaying] >> shift) + 1",
       "touch_strengths_reach_zero", "touch_strengths_one_by_one", compared="touch_strengths"),
    m("hits_count_once", "memory", "+ gain * counts)", "+ gain * counts.clamp(max=1))",
       "touch_strengths_one_by_one", compared="touch_strengths"),
    m("strengths_wrap", "memory", "(touched[named] + gain * counts).clamp(max=STRENGTH_MAX)",
       "(touched[named] + gain * counts)", "touch_strengths_one_by_one", compared="touch_strengths"),
    m("unused_slots_gain", "memory", "rows[rows >= 0].unique(", "rows.unique(",
       "touch_strengths_one_by_one", compared="touch_strengths"),
    m("all_strengths_decay", "memory", "torch.arange(window, device=strengths.device)",
       "torch.arange(strengths.numel(), device=strengths.device)",
       "touch_strengths_one_by_one", compared="touch_strengths"),
    m("decay_stops_at_the_end", "memory", "decaying = (first + torch.arange(window, device=strengths.device)) % strengths.numel()",
       "decaying = (first % strengths.numel() + torch.arange(window)).clamp(max=strengths.numel() - 1).unique()",
       "touch_strengths_one_by_one", compared="touch_strengths"),
    m("named_rows_do_not_decay", "memory", "    touched[decaying] -= ",
       "    decaying = decaying[~torch.isin(decaying, rows)]\n    touched[decaying] -= ",
       "touch_strengths_one_by_one", compared="touch_strengths"),
    m("later_rows_gain_more", "memory", "rows[rows >= 0].unique(return_counts=True)",
       "rows[rows >= 0].unique_consecutive(return_counts=True)",
       "touch_strengths_ignore_the_order", compared="touch_strengths"),
    m("out_keeps_the_rest", "memory", "result if out is None else out.copy_(result)",
       "result if out is None else out.copy_(torch.where(result == strengths, out, result))",
       "touch_strengths_in_place", compared="touch_strengths"),
    m("touched_rows_unchecked", "memory", 'checks.values_between("rows", rows, -1, strengths.numel() - 1)', "pass",
       "refusals_of_experts_attention_memory"),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = (*_ROWS, *_STRENGTHS)
"""Every broken implementation."""
