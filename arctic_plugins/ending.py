"""The end of a process of a distributed run."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from datetime import timedelta
from typing import NoReturn

__all__ = ["is_distributed", "leave"]

PATIENCE = timedelta(seconds=60)
"""How long a process that is done waits for the others."""

LOST = 120
"""Status of a process whose output could not be written, as CPython has it (``Py_RunMain``)."""


def is_distributed() -> bool:
    """Whether this process belongs to a process group of ``torch.distributed``. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave(status: int = 0) -> NoReturn:
    """End this process with ``status``, as ``sys.exit`` would, but without finalizing the interpreter.

    A thread of gloo lets go of a collective's tensors after those who wait for it have been told. Where that is the
    last reference to a tensor of Python, the thread wants the interpreter's lock; while the interpreter is being
    finalized, CPython (3.11: ``take_gil`` in ``Python/ceval_gil.h``) ends the thread instead, and the process dies of
    SIGABRT, "terminate called without an active exception". Nothing is lost by then, but a launcher takes the finished
    run for a failed one.

    With status 0 it waits up to a minute for the other processes and leaves the process group. With another it does
    neither: they may be stuck in a collective. Then, as at any end: threads that are no daemons are joined, ``atexit``
    functions run, streams are flushed; where that fails, 120 stands for status 0. Let go of trainer and model before,
    or call it where they are out of scope. Without ``torch.distributed`` it ends the process in the same way.
    """
    if is_distributed():
        gc.collect()
    if status == 0 and is_distributed():
        distributed = sys.modules["torch.distributed"]
        with contextlib.suppress(Exception):  # somebody has ended already, or is late: each says so itself
            distributed.barrier(async_op=True).wait(PATIENCE)
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()
    # What the interpreter does before it is finalized, and `multiprocessing` in its children.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except Exception:  # a full disk, or nobody reads it any more
                status = status or LOST
    os._exit(status)
