"""Measuring a run: what a probe keeps of it, and how that is recorded."""
