"""Products in Triton, against float64: in its interpreter, which takes CPU tensors, and on a GPU where there is one.
Also that they compile for the GPUs of the table, which needs none.

Triton reads ``TRITON_INTERPRET`` when it is imported, so the interpreted checks run in processes of their own: this
file is also a script, ``python test_triton.py CHECK``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from arctic_plugins_fp8 import kernels
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.formats import FORMATS
from arctic_plugins_fp8.kernels import reference

HERE = os.path.abspath(__file__)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float16: 2.0**-11}
SUMS = 2e-6
"""What float32 sums may be off by, over the sum of magnitudes."""


def encoded(codec, shape, device):
    """Codes of all kinds, also those that are never written; scales; and the weight in float64."""
    buffers = codec.encode(torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None])
    codes, scale = buffers[""].random_(), buffers["_scale"]
    weight = torch.empty(shape)
    reference.decode(codes, scale, codec.bits, weight)
    return codes.to(device), scale.to(device), weight.double().to(device)


def assert_close(found, rows, weight_KN, rounded_weights):
    """Within the rounding of the result, of float32 sums, and of the weights where these are rounded."""
    exact, magnitude = rows.double() @ weight_KN, rows.double().abs() @ weight_KN.abs()
    unit = UNIT[found.dtype]
    smallest = 2.0**-24 if found.dtype == torch.float16 else 1e-37  # subnormal results
    limit = unit * exact.abs() + (SUMS + (unit if rounded_weights else 0)) * magnitude + smallest
    assert bool(((found.double() - exact).abs() <= limit).all()), ((found.double() - exact).abs() / limit).max()


def check_products(device):
    from arctic_plugins_fp8.kernels import gpu_products

    dtypes, counts = itertools.cycle(DTYPES), itertools.cycle((1, 3, 17, 65))
    groups = ("channel", 32, 96, 100, 128)
    for bits, group, shape in itertools.product((8, 6, 12), groups, ((37, 77), (70, 128))):
        codec, dtype, rows = FP8Codec(bits=bits, group_size=group), next(dtypes), next(counts)
        codes, scale, weight = encoded(codec, shape, device)
        x, grad = (torch.randn(rows, size, device=device).to(dtype) for size in shape[::-1])
        found = gpu_products.fused_linear(x, codes, scale, bits)
        assert (found.dtype, found.shape) == (dtype, (rows, shape[0]))
        assert_close(found, x, weight.T, group == 100)
        assert_close(gpu_products.fused_grad_input(grad, codes, scale, bits, shape[1]), grad, weight, True)


def check_every_code(device):
    """By itself at every place of a unit, times one; subnormal codes and zeros count."""
    from arctic_plugins_fp8.kernels import gpu_products
    from arctic_plugins_fp8.kernels.gpu_blocks import RowBlock

    for bits in (8, 6, 12):
        unit = gpu_products.UNITS[bits]
        codes = torch.zeros(2**bits, unit, dtype=torch.int32)
        codes[torch.arange(2**bits), torch.arange(2**bits) % unit] = torch.arange(2**bits, dtype=torch.int32)
        packed = reference.pack(codes, bits)[:, None].to(device)
        values = torch.tensor(FORMATS[bits].values(), device=device)
        for scale in (1.0, 2.0**-130):
            scales, one = torch.full((2**bits, 1), scale, device=device), torch.ones(1, unit, device=device)
            found = gpu_products.fused_linear(one, packed, scales, bits, block=RowBlock(64, 16, 4))
            assert torch.equal(found[0], values * scale)
        for dtype in DTYPES if bits != 12 else DTYPES[:2]:
            codes = torch.arange(2**bits, dtype=torch.int32).roll(bits).view(-1, min(64, 2**bits // 4))
            packed = reference.pack(codes, bits)[:, None].to(device)
            scales = torch.full((len(codes), 1), 3.0, device=device)
            weight = torch.empty(codes.shape, dtype=dtype, device=device)
            reference.decode(packed, scales, bits, weight)
            one = torch.eye(codes.shape[1], device=device, dtype=dtype)
            assert torch.equal(gpu_products.fused_linear(one, packed, scales, bits), weight.T)
            one = torch.eye(len(codes), device=device, dtype=dtype)
            assert torch.equal(gpu_products.fused_grad_input(one, packed, scales, bits, codes.shape[1]), weight)


def check_memory(device):
    """Inputs that are not contiguous, codes that are not aligned, no rows, more dimensions, sums that are split."""
    from arctic_plugins_fp8.kernels import gpu_products

    for bits in (8, 6, 12):
        codes, scale, weight = encoded(FP8Codec(bits=bits, group_size=32), (40, 96), device)
        x = torch.randn(2, 96, 5, device=device).bfloat16().transpose(1, 2)
        expected = gpu_products.fused_linear(x.contiguous(), codes, scale, bits)
        assert torch.equal(gpu_products.fused_linear(x, codes, scale, bits), expected)
        wide = torch.randn(5, 200, device=device).bfloat16()
        assert_close(gpu_products.fused_linear(wide[:, 7:103], codes, scale, bits), wide[:, 7:103], weight.T, False)
        assert_close(
            gpu_products.fused_linear(wide[:1, :96], codes[::2], scale[::2], bits), wide[:1, :96], weight[::2].T, False
        )
        moved = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view(codes.shape).copy_(codes)
        for rows in (x, x[:1, :1]):
            expected = gpu_products.fused_linear(rows, codes, scale, bits)
            assert torch.equal(gpu_products.fused_linear(rows, moved, scale, bits), expected)
        grad = torch.randn(40, 3, device=device).bfloat16().T
        assert_close(gpu_products.fused_grad_input(grad, moved, scale, bits, 96), grad, weight, True)
        assert gpu_products.linear(x[:, :0], codes, scale, bits).shape == (2, 0, 40)
        assert gpu_products.grad_input(grad[:0], codes, scale, bits, 96).shape == (0, 96)
    codes, scale, weight = encoded(FP8Codec(), (40, 2100), device)
    for rows, dtype in ((3, torch.bfloat16), (2, torch.float32)):
        x, grad = torch.randn(rows, 2100, device=device).to(dtype), torch.randn(rows, 2100, device=device).to(dtype)
        found = [gpu_products.fused_linear(x, codes, scale, 8) for _ in range(2)]
        assert_close(found[0], x, weight.T, False)
        assert torch.equal(*found)  # parts are added in one order
        turned = codes.view(2100, 1, 40), torch.rand(2100, 1, device=device)
        exact = torch.empty(2100, 40)
        reference.decode(turned[0].cpu(), turned[1].cpu(), 8, exact)
        found = gpu_products.fused_grad_input(grad, *turned, 8, 40)
        assert_close(found, grad, exact.double().to(device), True)
    many = torch.randn(200, 2100, device=device)  # left to the library
    assert_close(gpu_products.linear(many, codes, scale, 8), many, weight.T, True)


def check_numbers(device):
    """Rows of any size, and what is not finite."""
    from arctic_plugins_fp8.kernels import gpu_products

    for bits, size in itertools.product((8, 6, 12), (1e-44, 1e-30, 1e30)):
        buffers = FP8Codec(bits=bits).encode(torch.randn(24, 80))
        weight = FP8Codec(bits=bits).decode(buffers, (24, 80), torch.float32).double().to(device)
        x = torch.randn(2, 80).mul(size).to(device)
        for rows in (x[:1], x):
            found = gpu_products.fused_linear(rows, buffers[""].to(device), buffers["_scale"].to(device), bits)
            # A product with a code may be a subnormal number of float32, whose step is then multiplied by the scale.
            limit = SUMS * (rows.double().abs() @ weight.abs().T) + 80 * 2e-45
            assert bool(((found.double() - rows.double() @ weight.T).abs() <= limit).all()), (bits, size)
    for value, dtype in itertools.product((float("inf"), float("nan")), (torch.bfloat16, torch.float32)):
        buffers = FP8Codec().encode(torch.ones(24, 80))
        x = torch.ones(3, 80, dtype=dtype)
        x[1, 5] = value
        for rows in (x[1:2], x):
            y = gpu_products.fused_linear(
                rows.to(device), buffers[""].to(device), buffers["_scale"].to(device), 8
            ).cpu()
            expected = rows.sum(1, keepdim=True).expand(-1, 24)
            torch.testing.assert_close(y, expected, rtol=0.1, atol=0, equal_nan=True)


def check_experts(device):
    """Idle experts, experts with few rows and with more than a block beside each other, none at all; rows of none."""
    from arctic_plugins_fp8.kernels import gpu_products

    dtypes, strays = itertools.cycle(DTYPES), itertools.cycle((0, 19))
    for (bits, group), counts in itertools.product(
        ((8, "channel"), (8, 100), (6, 32), (12, 128)), ([0, 1, 20, 0, 7, 2, 0], [3], [0, 40, 33], [0, 0])
    ):
        dtype, stray, (N, K) = next(dtypes), next(strays), (33, 130)
        codes, scale, weight = encoded(FP8Codec(bits=bits, group_size=group), (len(counts) * N, K), device)
        x, grad = (torch.randn(sum(counts) + stray, size, device=device).to(dtype) for size in (K, N))
        y = gpu_products.linear_experts(x, codes, scale, bits, torch.tensor(counts, device=device))
        result = gpu_products.grad_input_experts(grad, codes, scale, bits, K, torch.tensor(counts, device=device))
        assert (y.shape, result.shape) == ((len(x), N), (len(x), K))
        *parts, last = zip(*(tensor.split([*counts, stray]) for tensor in (x, y, grad, result)), strict=True)
        for own, (rows, found, grads, back) in zip(weight.view(-1, N, K), parts, strict=True):
            assert_close(found, rows, own.T, group == 100)
            assert_close(back, grads, own, True)
        assert not last[1].any()
        assert not last[3].any()
    codes, scale, _ = encoded(FP8Codec(), (30, 16), device)
    x = torch.ones(4, 16, device=device)
    with pytest.raises(RuntimeError, match="as many rows for each expert"):
        gpu_products.linear_experts(x, codes, scale, 8, torch.ones(4, dtype=torch.int64, device=device))
    with pytest.raises(RuntimeError, match="counts must be int64"):
        gpu_products.linear_experts(x, codes, scale, 8, torch.ones(3, device=device))


CHECKS = {
    "products": check_products,
    "every-code": check_every_code,
    "memory": check_memory,
    "numbers": check_numbers,
    "experts": check_experts,
}


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed")
    command, environment = [sys.executable, HERE, name], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name} in the interpreter\n"


def compiled(kernel, capability, bits, block, *, scales=0, words=True, experts=False):
    """What Triton makes of a kernel for bfloat16 inputs whose sizes are multiples of 16."""
    from arctic_plugins_fp8.kernels import gpu, gpu_blocks

    constants, options = gpu.constants(bits, words, scales) | {"INTERPRETED": False}, {"num_warps": 4}
    if block is None:
        constants |= {"BLOCK_N": 32, "BLOCK_K": 128}
    elif isinstance(block, gpu_blocks.RowBlock):
        constants |= {"BLOCK_N": block.n, "BLOCK_UNITS": block.units}
        options["num_warps"] = block.warps
    else:
        sizes = (block.n, block.k) if kernel.fn.__name__ == "multiply" else (block.k, block.n)
        constants |= {"BLOCK_M": block.m, "BLOCK_N": sizes[0], "BLOCK_K": sizes[1], "SPLIT": 1, "EXPERTS": experts}
        options |= {"num_warps": block.warps, "num_stages": block.stages}
    return compile_for(kernel, capability, constants, options, words)


def compile_for(kernel, capability, constants, options, words=True):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    pointers = {"codes": "*i32" if words else "*u8", "scale": "*fp32", "tiles": "*i32", "counts": "*i64"}
    pointers |= dict.fromkeys(("x", "grad", "out"), "*bf16")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name not in ("rows", "groups", "experts")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if words},
    )
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_compiled():
    """Within the card's shared memory, with its matrix units, wide loads, and subnormal numbers kept."""
    from arctic_plugins_fp8.kernels import gpu_blocks, gpu_kernels

    for capability, memory in ((80, 163), (90, 227)):
        card = gpu_blocks.card_of(f"{capability / 10}", 108)
        for kernel in (gpu_kernels.multiply, gpu_kernels.multiply_gradient):
            for block in (card.blocks[12][0], card.blocks[12][-1]):
                found = compiled(kernel, capability, 12, block)
                assert found.metadata.shared <= memory << 10
                assert compiled(kernel, capability, 8, block, experts=True).metadata.shared <= memory << 10
                unit = "wgmma" if capability == 90 and block.m >= 64 else "mma.sync"
                assert f"{unit}." in found.asm["ptx"]
                assert "cp.async" in found.asm["ptx"]
                assert "mul.ftz" not in found.asm["ptx"]
        assert (
            "mma.sync"
            in compiled(gpu_kernels.multiply, capability, 6, card.blocks[6][0], scales=2, words=False).asm["ptx"]
        )
        for bits in (8, 6):
            text = compiled(gpu_kernels.decode, capability, bits, None, scales=1).asm["ptx"]
            assert text.count("st.global.v4.b32") == 4  # 4,096 bfloat16 of 128 threads
            block = gpu_blocks.choose_row(card, 4096, 4096, bits, 4 if bits == 8 else 16)
            text = compiled(gpu_kernels.multiply_row, capability, bits, block, scales=1).asm["ptx"]
            assert text.count("ld.global.v4.b32") == (block.n if bits == 8 else 0)
            assert "mul.ftz" not in text
        compile_for(gpu_kernels.tiles_of_experts, capability, {"EXPERTS": 256, "BLOCK_M": 64}, {"num_warps": 4})


def test_it_compiles_for_the_gpus_of_the_table(tmp_path):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, HERE, "compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_blocks_follow_the_shape():
    pytest.importorskip("triton", reason="Triton is not installed")
    from arctic_plugins_fp8.kernels.gpu_blocks import TABLE, card_of, choose

    choose = functools.partial(choose, bits=8)
    cards = {name: card_of(name, 100) for name in json.loads(TABLE.read_text())}
    assert vars(card_of("6.1", 3)) == vars(card_of("other", 3))

    for on, dtype in itertools.product(cards.values(), DTYPES):
        few, many = (choose(on, dtype, rows=rows, width=4096, depth=4096) for rows in (4, 512))
        assert (few.m, many.split) == (16, 1)
        assert few.split <= 8  # at least 512 products each
        assert few.split > 1 or (on, dtype) == (cards["other"], torch.float32)  # which has programs enough
        assert many.m > few.m
        assert choose(on, dtype, rows=4, width=4096, depth=256).split == 1
        assert choose(on, dtype, rows=4, width=64, depth=4096, tiles=3).split == 1


def test_the_tuner_finds_the_fastest_blocks(capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    from arctic_plugins_fp8.kernels.gpu_blocks import TABLE, Block, card_of

    path = Path(__file__).parents[3] / "benchmarks" / "gpu_tune.py"
    spec = importlib.util.spec_from_file_location("gpu_tune", path)
    tuner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tuner)
    assert tuner.as_text(json.loads(TABLE.read_text())) == TABLE.read_text()

    def time_of(on, rows):
        if rows == 1:
            return 1 + abs(on.rows[6][0] - 2) + on.rows[6][1]
        (block,) = on.blocks[6]
        if block.stages * block.n * block.k > 4 * 128 * 128:  # as if the card had no more memory
            return float("inf")
        return 1 + abs(block.n - 128) + abs(block.k - 64) + abs(block.warps - 8) + (block.stages != 3)

    start = card_of("9.0", 100)
    on = tuner.tuned(start, 6, time_of, time.monotonic() + 60)
    assert on.rows == {**start.rows, 6: (2, 1)}
    assert on.blocks == {**start.blocks, 6: tuple(Block(m, 128, 64, 8, 3) for m in (16, 32, 64, 128))}
    assert tuner.tuned(start, 6, time_of, 0).blocks == start.blocks  # no time left
    capsys.readouterr()


def test_cuda_has_triton_or_the_reference(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from arctic_plugins_fp8.kernels import gpu, gpu_products, ops

    names = ("decode", "linear", "grad_input", "linear_experts", "grad_input_experts")
    find = ops._cuda.__wrapped__
    assert [find(name) for name in names] == [gpu.decode, *(getattr(gpu_products, name) for name in names[1:])]
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"arctic_fp8::{name}", "CUDA") for name in names)
    plain = [getattr(reference, name) for name in names]
    with monkeypatch.context() as patched:
        patched.setenv("ARCTIC_FP8_KERNELS", "reference")
        assert [find(name) for name in names] == plain
    for module in ("gpu", "gpu_products"):
        monkeypatch.delattr(f"arctic_plugins_fp8.kernels.{module}", raising=False)
        monkeypatch.setitem(sys.modules, f"arctic_plugins_fp8.kernels.{module}", None)  # as without Triton
    assert [find(name) for name in names] == plain


@pytest.mark.parametrize(
    ("capability", "hip", "has"),
    [((8, 0), None, False), ((8, 9), None, True), ((9, 0), None, True), ((12, 0), None, False), ((9, 4), "6.4", False)],
)
def test_cards_with_fp8_units(monkeypatch, capability, hip, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert reference._has_fp8_units(torch.device("cuda")) is has
    assert not reference._has_fp8_units(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    CHECKS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", [FP8Codec(), FP8Codec(group_size=128), FP8Codec(bits=6), FP8Codec(bits=12)], ids=str)
def test_operators_on_a_gpu(codec):
    """Shapes of a model, by the operators; without waiting for the device."""
    N, K = 1536, 2048
    codes, scale, weight = encoded(codec, (N, K), "cuda")
    for rows, dtype in itertools.product((1, 2, 16, 64, 300, 2048), DTYPES):
        sizes = [rows // 2, 0, rows - rows // 2]
        counts = torch.tensor(sizes, device="cuda")
        x = torch.randn(rows, K, device="cuda").to(dtype).requires_grad_()
        grad = torch.randn(rows, N, device="cuda").to(dtype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = kernels.linear(x, codes, scale, codec.bits)
            y.backward(grad)
            parts = kernels.linear_experts(x.detach(), codes, scale, codec.bits, counts)
            back = kernels.grad_input_experts(grad[:, : N // 3], codes, scale, codec.bits, K, counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(y.detach(), x.detach(), weight.T, True)
        assert_close(x.grad, grad, weight, True)
        for own, *split in zip(weight.view(3, -1, K), *(t.split(sizes) for t in (x, parts, grad, back)), strict=True):
            assert_close(split[1], split[0].detach(), own.T, True)
            assert_close(split[3], split[2][:, : N // 3], own, True)
    torch.library.opcheck(torch.ops.arctic_fp8.linear, (x[:3].detach().requires_grad_(), codes, scale, codec.bits))


if __name__ == "__main__":
    from arctic_plugins_fp8.kernels.gpu_products import INTERPRETED

    torch.manual_seed(0)
    if sys.argv[1] == "compiled":
        assert not INTERPRETED
        check_compiled()
    else:
        assert INTERPRETED
        CHECKS[sys.argv[1]]("cpu")
    print(sys.argv[1], "in the interpreter" if INTERPRETED else "")
