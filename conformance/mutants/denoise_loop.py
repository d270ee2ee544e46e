"""Broken implementations of the whole denoise loop."""

from __future__ import annotations

from conformance.mutants.mutant import Mutant, m

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    m("loop_without_a_norm", "denoise", "n_BD = unit_rows(linear(latent, latent_in))", "n_BD = linear(latent, latent_in)",
       "denoise_loop_by_hand", compared="denoise_loop"),
    m("loop_asks_without_its_query", "denoise", "attended(linear(n_BD, query) + ", "attended(n_BD + ",
       "denoise_loop_by_hand", compared="denoise_loop"),
    m("loop_forgets_the_step", "denoise", "linear(n_BD, query) + rows_TD[step]", "linear(n_BD, query)",
       "denoise_loop_by_hand", compared="denoise_loop"),
    m("loop_takes_the_mean_token", "denoise", "scores_BP.softmax(dim=-1)", "torch.full_like(scores_BP, 1 / scores_BP.shape[1])",
       "denoise_loop_by_hand", compared="denoise_loop"),
    m("loop_scales_no_scores", "denoise", ".squeeze(-1) / math.sqrt(q_BD.shape[-1])", ".squeeze(-1)", compared="denoise_loop"),
    m("loop_predicts_from_tokens_alone", "denoise", "F.silu(n_BD + c_BD)", "F.silu(c_BD)",
       "denoise_loop_by_hand", compared="denoise_loop"),
    m("loop_without_silu", "denoise", "F.silu(n_BD + c_BD)", "(n_BD + c_BD)",
       "denoise_loop_by_hand", "denoise_loop_takes_its_steps", compared="denoise_loop"),
    m("loop_starts_over", "denoise", "latent = denoise_step(latent, pred, alpha=alpha)",
       "latent = denoise_step(latent_BL.to(dtype), pred, alpha=alpha)",
       "denoise_loop_takes_its_steps", "denoise_loop_halts_each_sample", compared="denoise_loop"),
    m("loop_rounds_every_step", "denoise", "latent = denoise_step(latent, pred, alpha=alpha)",
       "latent = denoise_step(latent, pred, alpha=alpha).to(latent_BL.dtype).to(dtype)",
       "denoise_loop_rounds_once"),
    m("loop_of_one_row", "denoise", "rows_TD[step]", "rows_TD[0]", compared="denoise_loop"),
    m("halting_of_the_batch", "denoise", "goes_on = 1 - self.left + p < self.threshold",
       "goes_on = (1 - self.left + p < self.threshold).any()",
       "denoise_loop_halts_each_sample", compared="denoise_loop"),
    m("halting_after_the_threshold", "denoise", "1 - self.left + p < self.threshold", "1 - self.left + p <= self.threshold",
       "denoise_loop_halts_each_sample"),
    m("halting_gives_its_p", "denoise", "share = torch.where(goes_on, p, self.left)", "share = p",
       "denoise_loop_halts_each_sample", compared="denoise_loop"),
    m("halting_keeps_the_last", "denoise", "latent if halting is None else halting.mean", "latent",
       "denoise_loop_halts_each_sample", compared="denoise_loop"),
    m("halting_forgets_the_last_step", "denoise", "self.mean = self.mean + self.left * state", "pass",
       "denoise_loop_of_one_step_has_one_form", compared="denoise_loop"),
    m("halting_by_noise", "denoise", "return (signal + DEFAULT_EPS) /", "return (noise + DEFAULT_EPS) /",
       "denoise_loop_halts_each_sample", compared="denoise_loop"),
    m("loop_alphas_unchecked", "denoise", "    checks.denoise_loop(latent_BL, tokens_BPD, weights, alphas, halt_threshold)\n", "",
       "refusals_of_norm_embedding_denoise"),
)
# fmt: on
"""Every broken implementation."""
