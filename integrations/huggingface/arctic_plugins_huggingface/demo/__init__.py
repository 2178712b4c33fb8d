"""The main job of the project as one command: fine-tune a real model over FP8 weights, merge, serve with vLLM, and
measure.
"""
