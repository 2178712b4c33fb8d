"""FP8 weights: the `fp8` plugin."""
