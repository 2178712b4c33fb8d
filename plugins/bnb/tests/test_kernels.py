"""Every set of kernels that this machine can run, against decoding by torch and bitsandbytes, and float64."""

import itertools
from contextlib import closing

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from arctic_plugins_bnb import ops
from arctic_plugins_bnb.codec import Int8Codec, NF4Codec, _int8_rows, _rows

from arctic_plugins.kernels import obstacle
from arctic_plugins.testing import Forks

SHAPES = [(64, 128), (37, 77), (33, 1000), (100, 515), (5, 33), (1, 1), (48, 96), (1100, 64)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the sum of a product's magnitudes: weights and results are rounded."""
NF4, DOUBLE, INT8 = NF4Codec(), NF4Codec(double_quant=True), Int8Codec()
codecs = pytest.mark.parametrize("codec", [NF4, DOUBLE, INT8], ids=lambda codec: codec.describe())
NAMES = [name for name in ("portable", "avx2", "avx512", "avx512_bf16") if ops.compiled.use(name)]
ops.compiled.use()


@pytest.fixture(
    params=NAMES or [pytest.param("none", marks=pytest.mark.skip(reason=obstacle() or "they could not be built"))]
)
def compiled(request):
    assert ops.compiled.use(request.param) == request.param
    yield request.param
    ops.compiled.use()


def drawn(*shape, seed=0):
    """Rows of very different sizes, one of them zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 2, shape[-2])[:, None]
    weight[..., shape[-2] // 2, :] = 0
    return weight


def assert_product(found, rows, weight_KN):
    """``found`` is ``rows @ weight`` in the dtype of ``rows``."""
    exact, size = rows.double() @ weight_KN, rows.double().abs() @ weight_KN.abs()
    assert (found.dtype, found.shape) == (rows.dtype, exact.shape)
    assert bool(((found.double() - exact).abs() <= TOLERANCE[rows.dtype] * size).all()), (exact.shape, rows.dtype)


@codecs
def test_decoding_is_bitwise_the_references(compiled, codec):
    reference, rows = (ops._decode_int8, _int8_rows) if codec == INT8 else (ops._decode_nf4, _rows)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        buffers = codec.encode(drawn(*shape))
        buffers[""].random_()  # also those that are never written
        if codec == DOUBLE:
            buffers["_absmax"].random_()
        expected, found = torch.empty(shape, dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
        reference(*rows(buffers), expected)
        assert torch.equal(codec.decode(buffers, shape, dtype, out=found), expected), (shape, dtype)


def test_the_numbers_are_bitsandbytes(compiled):
    """Every code alone: they are written in the kernels' source."""
    codes = torch.arange(16, dtype=torch.uint8)[:, None, None].expand(16, 1, 32) * 17
    found = torch.empty(16, 64)
    ops.decode_nf4(codes, torch.ones(16, 1), None, None, found)
    assert torch.equal(found, bitsandbytes.get_4bit_type("nf4", device="cpu")[:, None].expand(16, 64))
    ones, zeros, found = torch.ones(256, 1), torch.zeros(256, 1), torch.empty(256, 64)
    ops.decode_nf4(codes[15:].expand(256, 1, 32), torch.arange(256, dtype=torch.uint8)[:, None], ones, zeros, found)
    assert torch.equal(found, bitsandbytes.create_dynamic_map()[:, None].expand(256, 64))


@codecs
def test_products_agree_with_float64(compiled, codec):
    for shape, rows, dtype in itertools.product(SHAPES, (1, 2, 4, 7, 13, 16, 33, 130, 300), DTYPES):
        buffers = codec.encode(drawn(*shape))
        weight = codec.decode(buffers, shape, torch.float64)
        x, grad = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
        assert_product(codec.linear(x, buffers, shape), x, weight.T)
        assert_product(codec.grad_input(grad, buffers, shape), grad, weight)


@codecs
def test_products_are_as_exact_as_those_of_the_weight_in_bfloat16(compiled, codec):
    weight, x = torch.randn(64, 1024), torch.randn(16, 1024).bfloat16()
    buffers = codec.encode(weight)
    exact = x.double() @ codec.decode(buffers, (64, 1024), torch.float64).T
    rounded = (x.double() @ codec.decode(buffers, (64, 1024), torch.bfloat16).double().T).bfloat16()
    for rows in (slice(0, 1), slice(0, 3), slice(0, 16)):
        found = codec.linear(x[rows], buffers, (64, 1024))
        assert (found - exact[rows]).norm() <= 1.1 * (rounded[rows] - exact[rows]).norm()


@codecs
def test_products_of_experts_agree_with_float64(compiled, codec):
    """Idle experts, experts with few rows and with many beside each other, none at all; rows that belong to none."""
    strays = itertools.cycle((0, 3))
    for (N, K), counts, dtype in itertools.product(
        [(37, 77), (33, 1000), (5, 33)], ([0, 1, 300, 0, 7, 16, 2, 40, 0], [3], [0, 0]), (torch.bfloat16, torch.float32)
    ):
        shape, rows = (len(counts), N, K), [*counts, next(strays)]
        buffers = codec.encode(drawn(*shape))
        weights = codec.decode(buffers, shape, torch.float64)
        x, grad = torch.randn(sum(rows), K).to(dtype), torch.randn(sum(rows), N).to(dtype)
        for found, given, matrices in (
            (codec.linear_experts(x, buffers, shape, torch.tensor(counts)), x, weights.mT),
            (codec.grad_input_experts(grad, buffers, shape, torch.tensor(counts)), grad, weights),
        ):
            *parts, last = found.split(rows)
            for part, own, matrix in zip(parts, given.split(rows)[:-1], matrices, strict=True):
                assert_product(part, own, matrix)
            assert not last.any()


@codecs
def test_idle_experts_are_not_read(compiled, codec):
    shape, counts = (3, 20, 64), torch.tensor([2, 0, 1])
    buffers = codec.encode(drawn(*shape))
    x = torch.randn(3, 64)
    expected = codec.linear_experts(x, buffers, shape, counts)
    buffers = {suffix: buffer.clone() for suffix, buffer in buffers.items()}
    for buffer in buffers.values():
        buffer[1] = torch.nan if buffer.is_floating_point() else 0
    assert torch.equal(codec.linear_experts(x, buffers, shape, counts), expected)


@codecs
def test_experts_and_rows_that_do_not_fit_are_refused(compiled, codec):
    shape = (3, 10, 16)
    buffers = codec.encode(torch.randn(shape))
    with pytest.raises(RuntimeError, match="as many rows for each expert"):
        codec.linear_experts(torch.ones(4, 16), buffers, shape, torch.tensor([1, 1, 1, 1]))
    for counts in ([2, 1, 2], [5, -1, 0]):
        with pytest.raises(RuntimeError, match="add up to at most the rows"):
            codec.linear_experts(torch.ones(4, 16), buffers, shape, torch.tensor(counts))
        with pytest.raises(RuntimeError, match="add up to at most the rows"):
            codec.grad_input_experts(torch.ones(4, 10), buffers, shape, torch.tensor(counts))
    with pytest.raises(RuntimeError, match="counts must be contiguous int64"):
        codec.linear_experts(torch.ones(4, 16), buffers, shape, torch.ones(3))
    with pytest.raises(RuntimeError, match="in_features"):
        codec.linear(torch.ones(4, 17), codec.encode(torch.randn(10, 16)), (10, 16))


def test_weights_that_do_not_fit_are_refused(compiled):
    codes, absmax, _, _ = _rows(NF4.encode(torch.randn(4, 100)))
    one = torch.ones(4, 1)
    for arguments, message in (
        ((codes, absmax, None, None, 200), "codes must be uint8"),
        ((codes.char(), absmax, None, None, 100), "codes must be uint8"),
        ((codes, absmax[:, :1], None, None, 100), "absmax must be"),
        ((codes, absmax, one, one, 100), "absmax must be"),
        ((codes, absmax.byte(), one, None, 100), "belong together"),
        ((codes, absmax.byte(), one.half(), one, 100), "scale must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear_nf4(torch.ones(2, arguments[-1]), *arguments)
    with pytest.raises(RuntimeError, match="codes must be int8"):
        ops.linear_int8(torch.ones(2, 4), torch.zeros(3, 1, 4, dtype=torch.uint8), torch.ones(3, 1))


@codecs
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_size_are_multiplied_as_exactly(compiled, codec, size):
    buffers = codec.encode(torch.randn(24, 80))
    weight = codec.decode(buffers, (24, 80), torch.float64)
    x = torch.randn(3, 80).mul(size)
    x[1, 1:] = 0
    x[2] *= torch.logspace(-6, 0, 80)
    for rows in (x[:1], x[1:2], x[2:], x[:2], x):
        y, bound = codec.linear(rows, buffers, (24, 80)), 1e-6 * (rows.double().abs() @ weight.abs().T) + 1e-37
        assert bool(((y.double() - rows.double() @ weight.T).abs() <= bound).all())


@codecs
def test_what_is_not_finite_stays_in_its_row(compiled, codec):
    buffers, x = codec.encode(torch.ones(24, 80)), torch.ones(20, 80)
    x[1, 5], x[2, 70] = torch.inf, torch.nan
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16), (2, 3, 20)):
        y = codec.linear(x[:rows].to(dtype), buffers, (24, 80)).float()
        expected = x[:rows].sum(1, keepdim=True).expand(-1, 24)
        torch.testing.assert_close(y, expected, rtol=0.1, atol=0, equal_nan=True)


@codecs
def test_non_contiguous_inputs(compiled, codec):
    whole = codec.encode(drawn(3, 40, 96))
    expert = {name: buffer[1] for name, buffer in whole.items()}
    weight = codec.decode(expert, (40, 96), torch.float32)
    x = torch.randn(2, 96, 5).bfloat16().transpose(1, 2)
    assert_product(codec.linear(x, expert, (40, 96)), x, weight.double().T)
    every_other = {name: buffer[::2] for name, buffer in expert.items()}
    assert torch.equal(codec.decode(every_other, (20, 96), torch.float32), weight[::2])
    y = codec.linear(x.float(), every_other, (20, 96))
    torch.testing.assert_close(y, codec.linear(x.float(), expert, (40, 96))[..., ::2], rtol=1e-4, atol=1e-4)


@codecs
def test_operators_pass_torchs_own_checks(codec):
    """Schema, fake tensors, autograd registration and AOT dispatch (torch.library.opcheck)."""
    suffix, rows = ("int8", _int8_rows) if codec == INT8 else ("nf4", _rows)
    weight, shape = rows(codec.encode(torch.randn(24, 40))), () if codec == INT8 else (40,)
    checked = {
        "linear": (torch.randn(3, 40, requires_grad=True), *weight, *shape),
        "grad_input": (torch.randn(3, 24), *weight, *shape),
        "linear_experts": (torch.randn(3, 40), *weight, *shape, torch.tensor([1, 0, 2])),
        "grad_input_experts": (torch.randn(3, 8), *weight, *shape, torch.tensor([1, 0, 2])),
        "decode": (*weight, torch.empty(24, 40)),
    }
    for name, arguments in checked.items():
        torch.library.opcheck(getattr(torch.ops.arctic_bnb, f"{name}_{suffix}").default, arguments)


@codecs
def test_a_compiled_function_has_no_breaks(codec):
    """Without Inductor's caches, as in the test of ``fp8``'s kernels."""
    buffers = codec.encode(torch.randn(24, 96))

    def function(x):
        return torch.relu(codec.linear(x, buffers, (24, 96))) + codec.decode(buffers, (24, 96), torch.float32).mean()

    x = torch.randn(5, 96, requires_grad=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        compiled = torch.compile(function, fullgraph=True)
        torch.testing.assert_close(compiled(x), function(x))
        compiled(x).sum().backward()
    expected = torch.autograd.grad(function(y := x.detach().clone().requires_grad_()).sum(), y)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.fixture(scope="module")
def forks():
    """Of a process that has imported torch, and nothing of the plugin, which looks for its kernels once."""
    with closing(Forks(["torch"])) as forks:
        yield forks


def test_without_compiled_kernels_everything_works(forks, tmp_path):
    """The reference, and products of the kernels here beside it."""
    torch.manual_seed(0)
    cases = []
    for codec in (NF4, DOUBLE, INT8):
        buffers, x, shape = codec.encode(torch.randn(3, 24, 40)), torch.randn(5, 40), (3, 24, 40)
        cases.append((codec, buffers, x, shape, codec.linear_experts(x, buffers, shape, torch.tensor([2, 0, 3]))))
    torch.save(cases, tmp_path / "cases")
    code = (
        "import torch; from arctic_plugins_bnb.plugin import BnB; print(*BnB.diagnose())\n"
        f"for codec, buffers, x, shape, y in torch.load('{tmp_path / 'cases'}', weights_only=False):\n"
        "    found = codec.linear_experts(x, buffers, shape, torch.tensor([2, 0, 3]))\n"
        "    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)"
    )
    done = forks.run(["-c", code], environment={"ARCTIC_BNB_KERNELS": "reference"})
    assert "warning" in done.stdout
    assert "CPU: reference in torch (ARCTIC_BNB_KERNELS is set, or the build failed)" in done.stdout
