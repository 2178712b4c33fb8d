"""Subcommands of ``arctic`` for the Hugging Face host. Modules here import nothing heavy until a command runs."""
