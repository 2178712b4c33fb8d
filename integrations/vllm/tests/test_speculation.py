"""What is mended in vLLM's sampling with speculation; plugins/speculate/tests/test_engine.py has it in the engine."""

from types import SimpleNamespace

import pytest
import torch
from arctic_plugins_vllm.speculation import compare_drafts, expand_batch_to_tokens

from arctic_plugins.resolver import host_version


def never(*_):
    raise AssertionError("vLLM's own function was called")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_values_of_requests_are_repeated_for_their_drafts(dtype):
    values = torch.tensor([3, 0, 5, 7], dtype=dtype)
    total = torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    found = expand_batch_to_tokens(never, values, total, 6, replace_from=0, replace_to=1)
    assert found.dtype == dtype
    assert found.tolist() == [3, 3, 1, 7, 7, 7]
    assert expand_batch_to_tokens(never, values, torch.zeros(4, dtype=torch.int32), 0).shape == (0,)
    meta = values.to("meta")
    assert expand_batch_to_tokens(lambda *arguments: arguments, meta, total, 6) == (meta, total, 6, 0, 0)


@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
def test_vllm_still_needs_it():
    """If this fails, vLLM has mended its function, and the patch can go."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    current_platform.import_kernels()
    output = torch.full((3,), -1.0)
    _expand_kernel_impl(output, torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32), 0, 1)
    assert output.tolist() == [-1.0] * 3


def test_a_step_without_drafts_is_sampled_as_without_speculation():
    sampler = SimpleNamespace(sampler=lambda **arguments: arguments)
    without, drafts = SimpleNamespace(max_spec_len=0), SimpleNamespace(max_spec_len=2)
    assert compare_drafts(never, sampler, without, None, 1, 2) == {"logits": 1, "sampling_metadata": 2}
    assert compare_drafts(lambda *arguments: arguments, sampler, drafts, None, 1, 2) == (sampler, drafts, None, 1, 2)
