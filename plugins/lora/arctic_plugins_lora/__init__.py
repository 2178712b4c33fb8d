"""Low-rank adapters over frozen weights: the `lora` plugin."""
