"""The diffusion mathematics: pure functions over (schedule, x, t), jax and numpy only.

schedules   alpha_bar tables, cosine and linear, respacing
guidance    classifier-free guidance, static and dynamic thresholding
gaussian    q(x_t | x_0), its posterior, conversions between x_0, eps and v
losses      L_simple, the learned-range hybrid loss, bits per dimension
solvers     DDPM, DDIM, DPM-Solver++, UniPC, Heun: one step each
sample      the one loop over steps that every solver shares
"""
