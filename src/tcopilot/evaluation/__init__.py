"""Evaluation of fused models: predictions, metrics with significance tests, and the `results.json` that holds them."""
