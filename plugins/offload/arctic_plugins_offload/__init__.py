"""Frozen weights in host memory or on disk, fetched for the moment in which they are used: the `offload` plugin."""
