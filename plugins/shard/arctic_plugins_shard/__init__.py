"""The `shard` plugin: frozen weights that are spread over the processes of a run and gathered just in time."""
