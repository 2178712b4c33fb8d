"""What is on disk: checking checkpoints and adapters, rewriting them, and writing whole or not at all."""
