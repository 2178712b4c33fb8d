"""The demo of arctic-plugins, ``arctic demo``: fine-tune a real model over FP8 weights, merge, serve and measure it."""
