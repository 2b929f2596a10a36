"""Checkpoints of the hub: files that are not trusted, benchmarks, and re-mixing on them."""
