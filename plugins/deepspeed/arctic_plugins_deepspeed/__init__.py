"""ZeRO over frozen and spread weights, checkpoints of the original stack, and the launcher for several hosts: the
`deepspeed` plugin.
"""
