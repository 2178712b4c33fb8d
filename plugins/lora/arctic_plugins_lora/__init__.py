"""The `lora` plugin: low-rank adapters over frozen weights."""
