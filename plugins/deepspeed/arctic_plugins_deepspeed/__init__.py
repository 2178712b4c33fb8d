"""The `deepspeed` plugin: ZeRO over frozen and spread weights, the original stack's checkpoints, and several hosts."""
