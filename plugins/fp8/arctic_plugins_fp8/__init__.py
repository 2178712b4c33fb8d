"""The `fp8` plugin: FP8 weights."""
