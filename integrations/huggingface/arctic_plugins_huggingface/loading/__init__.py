"""From a checkpoint and a stack to a model."""
