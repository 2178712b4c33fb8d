"""The `moe` plugin: mixtures of experts, with Snowflake Arctic on both hosts and expert parallelism in training."""
