"""A plugin that appends a line to the file ``$ARCTIC_TEST_TRACE`` in each process that has registered the plugins."""

import json
import os
import sys
from multiprocessing import current_process

from arctic_plugins import Plugin, hookimpl

TRACE = "ARCTIC_TEST_TRACE"


def note(how, registered):
    with open(os.environ[TRACE], "a") as file:
        line = {"how": how, "pid": os.getpid(), "parent": os.getppid(), "name": current_process().name}
        file.write(json.dumps({**line, "registered": registered, "command": sys.orig_argv}) + "\n")


class Traced(Plugin):
    """Does nothing else. A forked process has the registry of its parent, if the parent had registered by then."""

    name = "traced"

    @classmethod
    @hookimpl
    def register(cls, registry):
        if TRACE in os.environ:
            note("register", True)
            os.register_at_fork(after_in_child=lambda: note("fork", "traced" in registry.plugins))
