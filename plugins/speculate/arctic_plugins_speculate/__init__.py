"""The ``speculate`` plugin."""
