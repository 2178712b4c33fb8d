"""The `bnb` plugin: bitsandbytes' nf4 and int8 weights."""
