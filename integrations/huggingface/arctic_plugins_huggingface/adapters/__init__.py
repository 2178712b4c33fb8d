"""PEFT adapters over frozen weights."""
