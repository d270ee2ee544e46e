"""Broken implementations of the family attention."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant, m

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    m("scores_not_scaled", "attention", "keys_BSK.transpose(1, 2) * scale + bias", "keys_BSK.transpose(1, 2) + bias",
      "decode_attention_by_torch", compared="decode_attention"),
    m("bias_scaled_with_the_score", "attention", "keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :]",
      "keys_BSK.transpose(1, 2) * scale + bias_BS[:, None, :] * scale",
      "decode_attention_by_torch", "decode_attention_counts_a_summary_as_many", compared="decode_attention"),
    m("rotary_key_left_out", "attention", "q_BHK.to(wide) @ keys_BSK.transpose(1, 2)",
      "q_BHK.to(wide)[:, :, :value_width] @ keys_BSK[:, :, :value_width].transpose(1, 2)",
      "decode_attention_by_torch", compared="decode_attention"),
    m("values_from_the_end", "attention", "keys_BSK[:, :, :value_width]", "keys_BSK[:, :, -value_width:]",
      "decode_attention_of_one_visible_slot", "decode_attention_by_torch", compared="decode_attention"),
    m("hidden_slots_read", "attention", "torch.where(visible_BS1, keys_BSK.to(wide), 0.0)", "keys_BSK.to(wide)",
      "decode_attention_reads_only_what_is_visible"),
    m("nothing_visible_is_nan", "attention",
      "torch.where(visible_BS1.transpose(1, 2), scores_BHS.softmax(dim=-1), 0.0)", "scores_BHS.softmax(dim=-1)",
      "decode_attention_of_one_visible_slot", compared="decode_attention"),
    m("nothing_visible_is_a_mean", "attention", "+ bias_BS[:, None, :]\n",
      "+ bias_BS[:, None, :].clamp(min=-1e4)\n",
      "decode_attention_of_one_visible_slot"),
    m("summaries_count_once", "attention", "+ bias_BS[:, None, :]\n", "+ bias_BS[:, None, :].clamp(max=0)\n",
      "decode_attention_counts_a_summary_as_many", "decode_attention_by_torch", compared="decode_attention"),
    m("shares_rounded", "attention", "scores_BHS.softmax(dim=-1), 0.0)",
      "scores_BHS.softmax(dim=-1), 0.0).to(torch.bfloat16).to(wide)",
      "decode_attention_by_torch", compared="decode_attention"),
    m("softmax_over_heads", "attention", "scores_BHS.softmax(dim=-1)", "scores_BHS.softmax(dim=1)",
      "decode_attention_by_torch", "decode_attention_of_one_visible_slot", compared="decode_attention"),
    m("no_slots_no_width", "attention", "    wide = wide_dtype(q_BHK)",
      "    if not keys_BSK.shape[1]:\n        return torch.zeros_like(q_BHK)\n"
      "    wide = wide_dtype(q_BHK)",
      "decode_attention_of_no_slots"),
    m("slot_bias_unchecked", "attention", "checks.slot_bias(bias_BS)", "pass",
      "refusals_of_experts_attention_memory"),
)
# fmt: on
"""Every broken implementation."""
