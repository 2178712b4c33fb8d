"""The ``rope`` plugin."""
