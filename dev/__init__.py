"""Developer tooling: standard library only, so that it runs before the environment exists."""
