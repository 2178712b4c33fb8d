"""Where a training step reads a value from the device, which makes the host wait for it.

On CPU, the operators that would wait on a GPU are counted; on a GPU, torch itself reports them.
"""

from collections import Counter

import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_moe.router import Capacity, expert_load, load_balancing_loss, router_entropy, z_loss
from torch.utils._python_dispatch import TorchDispatchMode

from arctic_plugins import Stack
from arctic_plugins.testing import MIXTURES, tiny_model

WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
IDS = torch.arange(10, 42)[None]
LORA = {"fp8": {}, "lora": {"r": 4}}
STACKS = [
    (LORA, {}),
    ({**LORA, "fp8": {"bits": 6, "group_size": 32}}, {}),
    ({**LORA, "longseq": {"recompute": 1, "tiled_mlp": True, "tiled_loss": False}}, {}),
    ({**LORA, "longseq": {}}, {"nonzero": 1}),  # to leave out ignored tokens
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    model_type, config = MIXTURES["mixtral"]
    return tiny_model(tmp_path_factory.mktemp("mixtral"), model_type, **config)


class Waits(TorchDispatchMode):
    """Counts operators whose result has a size or a type that depends on values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def inputs(device):
    """A batch on the device. Making it there from values of the host would wait as well."""
    ids = IDS.to(device)
    # Without a mask, or with one of two dimensions, transformers looks for packed texts or padding, and waits for that.
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    items = torch.tensor(31, device=device)
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False, "num_items_in_batch": items}


def step(model, batch, optimizer):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(checkpoint, plugins, device):
    model, _ = load_model(checkpoint, Stack.from_dict(plugins))
    model = model.to(device).train()
    return model, torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)


@pytest.mark.parametrize(("plugins", "expected"), STACKS)
def test_a_step_reads_nothing_from_the_device(tiny_checkpoint, plugins, expected):
    model, optimizer = trained(tiny_checkpoint, plugins, "cpu")
    batch = inputs("cpu")
    with Waits() as waits:
        step(model, batch, optimizer)
    assert waits.found == expected


@pytest.mark.parametrize("lora", [{"r": 8, "experts": True}, {"r": 4}], ids=["on experts", "beside them"])
def test_a_step_of_a_mixture_reads_nothing_from_the_device(mixture, monkeypatch, lora):
    monkeypatch.setattr("arctic_plugins.frozen.experts._count_is_far", lambda device: True)  # as on a GPU
    model, optimizer = trained(mixture, {"fp8": {}, "lora": lora}, "cpu")
    batch = inputs("cpu")
    with Waits() as waits:
        step(model, batch, optimizer)
    assert waits.found == {}


def test_the_count_finds_what_it_is_for():
    with Waits() as waits:
        x = torch.arange(3)
        bool(x.sum() > 0), x[x > 1], torch.bincount(x)
    assert waits.found == {"_local_scalar_dense": 1, "index": 1, "bincount": 1}


def test_statistics_and_losses_of_routers_read_nothing_from_the_device():
    logits, index = torch.randn(8, 4), torch.tensor([[0, 1]] * 7 + [[4, -1]])
    with Waits() as waits:
        expert_load(index, 4), router_entropy(logits), load_balancing_loss([logits], 2), z_loss([logits])
        Capacity(1.0).apply(index.clamp(0), torch.rand(8, 2), 4)
    assert waits.found - Counter({"_local_scalar_dense": 2}) == {}, "one_hot checks its input, on CPU only"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plugins", [plugins for plugins, expected in STACKS if not expected])
@pytest.mark.parametrize("offload", [{}, {"offload": {"ratio": 0.5}}])
def test_a_step_on_a_gpu_waits_for_nothing(tiny_checkpoint, plugins, offload):
    check_waits_for_nothing(tiny_checkpoint, {**plugins, **offload})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_of_a_mixture_on_a_gpu_waits_for_nothing(mixture):
    with torch.autocast("cuda", torch.bfloat16):  # grouped products in float32 would wait
        check_waits_for_nothing(mixture, {"fp8": {}, "lora": {"r": 8, "experts": True}})


def check_waits_for_nothing(checkpoint, plugins):
    model, optimizer = trained(checkpoint, plugins, "cuda")
    batch = inputs("cuda")
    for number in range(10):
        torch.cuda.set_sync_debug_mode("error" if number > 7 else "default")
        try:
            step(model, batch, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
