"""Kernels of an author's plugin: one format, for any processor, in the fifty lines of ``kernels``."""

from pathlib import Path

import pytest
import torch

from arctic_plugins.kernels import CompiledKernels, obstacle


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_a_plugins_own_format_is_multiplied(tmp_path):
    library = torch.library.Library("arctic_signs", "FRAGMENT")
    library.define("linear(Tensor x, Tensor codes, Tensor scale) -> Tensor")
    calls = []
    library.impl("linear", lambda x, *_: calls.append(x) or x, "CompositeExplicitAutograd")
    kernels = CompiledKernels("signs", "SIGNS_KERNELS", Path(__file__).parent / "kernels", ["portable"])
    kernels.implement(["linear"])

    signs = torch.randint(0, 2, (50, 80), generator=torch.Generator().manual_seed(0))
    codes = (signs.view(50, 10, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    scale = torch.rand(50, 1)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 80)
        found = torch.ops.arctic_signs.linear(x, codes, scale)
        torch.testing.assert_close(found, x @ ((2.0 * signs - 1) * scale).T, rtol=1e-4, atol=1e-4)
    assert not calls, "the first call already built the kernels"
    assert kernels.describe() == (True, "compiled, portable instructions")
    assert kernels.use("avx2") == "", "for which there is no source"
