"""A stage's sampler: its network and the diffusion maths, as a jitted function."""
