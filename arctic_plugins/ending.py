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
"""How long a finished process waits for the others."""

LOST = 120
"""Exit status of a process whose output could not be written, as in CPython (``Py_RunMain``)."""


def is_distributed() -> bool:
    """Return whether this process belongs to a process group of ``torch.distributed``, without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave(status: int = 0) -> NoReturn:
    """End this process with ``status``, as ``sys.exit`` would, but without finalizing the interpreter.

    A gloo thread releases a collective's tensors after it has notified the threads that wait for it. If that drops the
    last reference to a Python tensor, the thread needs the interpreter's lock. While the interpreter is being
    finalized, CPython (3.11: ``take_gil`` in ``Python/ceval_gil.h``) ends the thread instead, and the process dies of
    SIGABRT, "terminate called without an active exception". Nothing is lost by then, but a launcher mistakes the
    finished run for a failed one.

    With status 0, this function waits up to a minute for the other processes and leaves the process group. With any
    other status it does neither, because the others may be stuck in a collective. In both cases it then joins threads
    that are not daemons, runs ``atexit`` functions and flushes the streams, as usual when a process ends. If a stream
    cannot be flushed, 120 replaces status 0. Release the trainer and the model beforehand, or call this function where
    they are out of scope. Without ``torch.distributed``, it ends the process in the same way.
    """
    if is_distributed():
        gc.collect()
    if status == 0 and is_distributed():
        distributed = sys.modules["torch.distributed"]
        with contextlib.suppress(Exception):  # another process has ended already, or is late: it reports that itself
            distributed.barrier(async_op=True).wait(PATIENCE)
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()
    # What the interpreter does before it is finalized, and `multiprocessing` does in its children.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except Exception:  # a full disk, or nobody reads the stream any more
                status = status or LOST
    os._exit(status)
