"""Broken implementations of orthogonalised gradients."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant, m

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    m("orthogonal_without_the_quintic_term", "orthogonal", "b * s.to(wide) + c *", "b * s.to(wide) + 0 * c *",
       "orthogonalize_by_singular_values", compared="orthogonalize"),
    m("orthogonal_one_step_short", "orthogonal", "in range(iterations)", "in range(iterations - 1)",
       "orthogonalize_by_singular_values", compared="orthogonalize"),
    m("orthogonal_by_the_largest_element", "orthogonal", ".square().sum().sqrt()", ".abs().max()",
       "orthogonalize_by_singular_values", compared="orthogonalize"),
    m("orthogonal_norm_in_the_gradients_dtype", "orthogonal", "norm = grad_NK.to(torch.float64)", "norm = grad_NK",
       "orthogonalize_descends", compared="orthogonalize"),
    m("orthogonal_gradient_ascends", "orthogonal", "(a * x.to(wide) + polynomial", "(-a * x.to(wide) - polynomial",
       "orthogonalize_descends", "orthogonalize_by_singular_values", compared="orthogonalize"),
    m("orthogonal_stack_as_one_matrix", "orthogonal", "unflatten(0, (num_groups, -1))", "unflatten(0, (1, -1))",
       "orthogonalize_by_singular_values", "orthogonalize_takes_each_matrix_on_its_own", compared="orthogonalize"),
    m("orthogonal_bad_rows_spread", "orthogonal", "torch.where(finite_N, grad_NK, 0.0)", "(grad_NK + 0.0)",
       "orthogonalize_leaves_bad_rows_out", compared="orthogonalize"),
    m("orthogonal_bad_rows_fall_silent", "orthogonal", "torch.where(finite_N, out_NK, torch.nan)", "out_NK",
       "orthogonalize_leaves_bad_rows_out", compared="orthogonalize"),
    m("orthogonal_zeros_divide", "orthogonal", "torch.where(norm > 0, norm, 1.0)", "norm",
       "orthogonalize_ignores_the_scale", compared="orthogonalize"),
)
# fmt: on
"""Every broken implementation."""
