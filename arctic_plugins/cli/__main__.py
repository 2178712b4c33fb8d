"""``python -m arctic_plugins.cli``: ``arctic`` without its script, for child processes of the same interpreter."""

from arctic_plugins.cli import main

main()
