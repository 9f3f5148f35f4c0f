"""Flax Linen modules, sized by their configs alone: no diffusion maths, no data, no mesh."""
