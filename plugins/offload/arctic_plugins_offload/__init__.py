"""The `offload` plugin: frozen weights in host memory or on disk, fetched just in time."""
