"""For the scripts that start the engine: its other processes are forks."""

import multiprocessing

import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor


def fork_workers():
    """As vLLM does with GPUs. With CPUs it spawns them (0.32.0: ``platforms/cpu.py``), and each imports vLLM again, for
    15 to 60 s.
    """
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
