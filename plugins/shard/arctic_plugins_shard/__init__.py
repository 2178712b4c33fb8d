"""Frozen weights spread over the processes of a run, and gathered for the moment in which they are used: the `shard`
plugin.
"""
