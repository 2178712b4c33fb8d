"""Mixtures of experts: Snowflake Arctic's model on both hosts, and expert parallelism for training."""
