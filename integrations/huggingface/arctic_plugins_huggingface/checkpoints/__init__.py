"""Whole checkpoints: saving, loading, merging, exporting, converting."""
