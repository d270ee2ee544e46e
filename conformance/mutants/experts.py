"""Broken implementations of the family experts."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant, m

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    m("experts_interleaved", "experts", "torch.arange(expert * num_rows, (expert + 1) * num_rows, device",
      "torch.arange(expert, weight.shape[0], weight.shape[0] // num_rows, device",
      "grouped_linear_by_slot", "grouped_linear_adjoint", "grouped_linear_of_narrow_matrices",
      compared=("grouped_linear", "grouped_linear_input_grad")),
    m("unused_slots_take_the_first_expert", "experts", "slots = experts_M == expert",
      "slots = experts_M.clamp(min=0) == expert",
      "grouped_linear_by_slot", "grouped_linear_weight_grad_by_slot",
      compared=("grouped_linear", "grouped_linear_weight_grad"), times=3),
    m("unused_slots_kept_as_they_were", "experts", "    for expert in _used(experts_M):",
      "    if not _used(experts_M) or (experts_M < 0).any():\n        experts_M = experts_M.clamp(min=0)\n"
      "    for expert in _used(experts_M):",
      "grouped_linear_slots_are_independent", times=3),
    m("slots_sorted_and_not_put_back", "experts", "y_MN[slots] = (x_MK[slots].to(wide)",
      "y_MN[slots] = (x_MK[slots.sort(descending=True).values].to(wide)",
      "grouped_linear_by_slot", "grouped_linear_ignores_the_order_of_slots", compared="grouped_linear"),
    m("grouped_input_grad_of_the_first_expert", "experts",
      "grad_MN[slots].to(wide) @ _matrix(weight, expert, num_rows, wide)",
      "grad_MN[slots].to(wide) @ _matrix(weight, 0, num_rows, wide)",
      "grouped_linear_adjoint", compared="grouped_linear_input_grad"),
    m("grouped_weight_grad_in_the_dtype_of_x", "experts", "= grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)",
      "= (grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)).to(x_MK.dtype)",
      "grouped_linear_weight_grad_by_slot", compared="grouped_linear_weight_grad"),
    m("grouped_weight_grad_of_a_hundred_slots", "experts", "= grad_MN[slots].to(wide).T @ x_MK[slots].to(wide)",
      "= grad_MN[slots][:100].to(wide).T @ x_MK[slots][:100].to(wide)",
      "grouped_linear_weight_grad_of_frequent_experts"),
    m("grouped_weight_grad_by_row", "experts", "return grads_ENK.flatten(0, 1)",
      "return grads_ENK.transpose(0, 1).reshape(-1, x_MK.shape[1])",
      "grouped_linear_weight_grad_by_slot", "grouped_linear_adjoint", compared="grouped_linear_weight_grad"),
    m("grouped_sums_in_bfloat16", "experts", "    wide = wide_dtype(x_MK)\n    y_MN",
      "    wide = x_MK.dtype\n    x_MK = x_MK.to(torch.bfloat16).to(wide)\n    y_MN", compared="grouped_linear"),
    m("no_slots_no_shape", "experts", "    y_MN = torch.zeros(x_MK.shape[0], num_rows,",
      "    y_MN = torch.zeros(max(1, x_MK.shape[0]), num_rows,",
      "grouped_linear_of_no_slots", compared="grouped_linear"),
    m("unused_slots_counted", "experts", "experts.flatten() + 1, minlength=num_groups + 1)[1:]",
      "experts.flatten().clamp(min=0), minlength=num_groups)",
      "expert_load_counts", compared="expert_load"),
    m("experts_unchecked", "experts", 'checks.values_between("experts_M", experts_M, -1, num_groups - 1)', "pass",
      "refusals_of_experts_attention_memory", times=3),
)
# fmt: on
"""Every broken implementation."""
