"""Looking at a run: what a probe keeps, and how it is recorded."""
