"""Diffusion transformers: one row for each family, and one way for all of them."""
