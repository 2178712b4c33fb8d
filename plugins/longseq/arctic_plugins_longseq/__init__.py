"""The ``longseq`` plugin."""
