"""Run in two processes: the laws of dispatches, and a mixture that computes the same as in one process."""

import sys

import torch
import torch.distributed as dist
from arctic_plugins import Stack
from arctic_plugins.testing import DispatchSuite, say
from arctic_plugins_huggingface import load_model

from arctic_acme_0_1_dispatch.dispatch import Acme01DispatchDispatch

dist.init_process_group("gloo")
DispatchSuite().check(dispatch=Acme01DispatchDispatch(2))

spread, _ = load_model(sys.argv[1], Stack.from_dict({"acme-0-1-dispatch": {"processes": 2}}))
plain, _ = load_model(sys.argv[1])
ids = torch.arange(10, 30)[None] + dist.get_rank()
difference = (spread(ids).logits - plain(ids).logits).abs().max().item()
say({"experts": len(spread.model.layers[0].mlp.experts.down_proj), "difference": difference})
