"""Run in an interpreter of its own: forks pairs of processes that end right after a collective, and counts their exit
statuses.

``python ending_script.py PAIRS leave|exit|alone DIRECTORY`` prints them as JSON. With ``alone`` the second of a pair
ends with status 7 before the first leaves. With ``exit`` the interpreter is finalized while gloo's thread still has the
collective's tensor: on two cores about one process in five dies of SIGABRT (-6). The long switch interval keeps the
thread waiting for the lock.
"""

import collections
import json
import os
import sys

import torch
import torch.distributed as dist

from arctic_plugins.ending import leave


def end_after_a_collective(rank, file, how):
    sys.setswitchinterval(100)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for _ in range(2):
        tensor = torch.ones(1000)
        dist.all_reduce(tensor, async_op=True).wait()
        del tensor
    if how == "alone" and rank:
        os._exit(7)
    if how != "exit":
        leave()


if __name__ == "__main__":
    pairs, how, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    found = collections.Counter()
    for pair in range(pairs):
        children = []
        for rank in range(2):
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                end_after_a_collective(rank, os.path.join(directory, str(pair)), how)
                sys.exit()
            children.append(child)
        for child in children:
            found[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    print(json.dumps(found))
