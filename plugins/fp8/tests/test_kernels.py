"""Every set of kernels that this machine can run, against the reference in torch."""

import itertools
from contextlib import closing

import pytest
import torch
from arctic_plugins_fp8 import kernels
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.formats import FORMATS
from arctic_plugins_fp8.kernels import ops, reference

from arctic_plugins.kernels import library, obstacle
from arctic_plugins.testing import Forks, run_python

SHAPES = [(64, 128), (37, 77), (33, 1000), (100, 515), (5, 33), (1, 1), (48, 96), (1100, 64)]
CODECS = [
    FP8Codec(bits=bits, group_size=group)
    for bits, group in itertools.product((8, 6, 12), ("channel", 32, 100, 128, 512))
]
NAMES = [name for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx") if kernels.use(name)]
kernels.use()
DESCRIBE = ["-c", "from arctic_plugins_fp8 import kernels; print(kernels.describe())"]


@pytest.fixture(
    params=NAMES
    or [pytest.param("none", marks=pytest.mark.skip(reason=obstacle() or "the kernels could not be built"))]
)
def compiled(request):
    assert kernels.use(request.param) == request.param
    yield request.param
    kernels.use()


def empty(codec, shape):
    return [torch.empty(spec.shape, dtype=spec.dtype) for spec in codec.layout(shape).values()]


def encoded(codec, shape, seed=0):
    buffers = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return buffers[""], buffers["_scale"]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encoding_is_bitwise_the_references(compiled, codec):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        weight = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(dtype)
        weight[0, ::3] = 0
        expected, found = empty(codec, shape), empty(codec, shape)
        assert reference.encode(weight, *expected, codec.bits, 57344.0, 1)
        assert kernels.encode(weight, *found, codec.bits, 57344.0, 1)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (shape, dtype)


@pytest.mark.parametrize("codec", CODECS[1::5], ids=str)
def test_the_best_scale_is_the_best_of_the_candidates(compiled, codec):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        weight = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(dtype)
        weight[0] = 0
        codes, scale = empty(codec, shape)
        errors = []
        for candidate in range(16):  # by the definition, from the scales of the largest magnitude
            assert kernels.encode(weight, codes, scale, codec.bits, 57344.0, 1)
            scale *= 1 + candidate / 16
            group = codes.shape[-1] * 8 // codec.bits
            padded = torch.nn.functional.pad(weight.double(), (0, scale.shape[1] * group - shape[1])).unflatten(
                -1, (-1, group)
            )
            grid = torch.tensor(FORMATS[codec.bits].values()).double().unique()
            scaled = padded / scale[..., None]
            nearest = grid[(torch.bucketize(scaled, (grid[1:] + grid[:-1]) / 2))]
            errors.append(((nearest - scaled) * scale[..., None]).square().sum(-1))
        smallest = torch.stack(errors).min(0).values
        for encode in (reference.encode, kernels.encode):
            assert encode(weight, codes, scale, codec.bits, 57344.0, 16)
            found = torch.empty(shape)
            kernels.decode(codes, scale, codec.bits, found)
            difference = torch.nn.functional.pad(
                found.double() - weight.double(), (0, scale.shape[1] * group - shape[1])
            ).unflatten(-1, (-1, group))
            limit = 1e-3 * smallest + 1e-9 * padded.square().sum(
                -1
            )  # what float32 makes of errors that are nearly none
            assert ((difference.square().sum(-1) - smallest).abs() <= limit).all(), (shape, dtype)
        if weight.numel() > 1000:
            assert smallest.sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decoding_is_bitwise_the_references(compiled, codec):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        codes, scale = encoded(codec, shape)
        codes.random_()  # also those that are never written
        expected, found = torch.empty(shape, dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
        reference.decode(codes, scale, codec.bits, expected)
        kernels.decode(codes, scale, codec.bits, found)
        assert torch.equal(expected, found), (shape, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_cannot_be_represented_is_told(compiled, bad):
    for at in (0, 17, 76):
        weight = torch.randn(37, 77)
        weight[36, at] = bad
        assert not kernels.encode(weight, *empty(FP8Codec(), (37, 77)), 8, 57344.0, 1)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_products_agree_with_float64(compiled, codec):
    for shape, rows, dtype in itertools.product(
        SHAPES, (1, 2, 4, 7, 13, 16, 33, 130, 300), (torch.bfloat16, torch.float32)
    ):
        codes, scale = encoded(codec, shape)
        weight = torch.empty(shape)
        reference.decode(codes, scale, codec.bits, weight)
        x, grad = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for found, exact in (
            (kernels.linear(x, codes, scale, codec.bits), x.double() @ weight.double().T),
            (kernels.grad_input(grad, codes, scale, codec.bits, shape[1]), grad.double() @ weight.double()),
        ):
            assert found.dtype == dtype
            assert (found - exact).norm() <= tolerance * exact.norm(), (shape, rows, dtype)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_products_of_experts_agree_with_float64(compiled, codec):
    """Idle experts, experts with few rows and with many beside each other, none at all; rows that belong to none."""
    strays = itertools.cycle((0, 3))
    for (N, K), counts, dtype in itertools.product(
        [(37, 77), (33, 1000), (5, 33)], ([0, 1, 300, 0, 7, 16, 2, 40, 0], [3], [0, 0]), (torch.bfloat16, torch.float32)
    ):
        codes, scale = encoded(codec, (len(counts) * N, K))
        weight = torch.empty(len(counts) * N, K)
        reference.decode(codes, scale, codec.bits, weight)
        weights = weight.double().view(len(counts), N, K)
        rows = [*counts, next(strays)]
        x, grad = torch.randn(sum(rows), K).to(dtype), torch.randn(sum(rows), N).to(dtype)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for found, exact in (
            (
                kernels.linear_experts(x, codes, scale, codec.bits, torch.tensor(counts)),
                [own.double() @ weight.T for own, weight in zip(x.split(rows)[:-1], weights, strict=True)],
            ),
            (
                kernels.grad_input_experts(grad, codes, scale, codec.bits, K, torch.tensor(counts)),
                [own.double() @ weight for own, weight in zip(grad.split(rows)[:-1], weights, strict=True)],
            ),
        ):
            assert found.dtype == dtype
            *parts, last = found.split(rows)
            for part, own in zip(parts, exact, strict=True):
                assert (part - own).norm() <= tolerance * own.norm(), (N, K, counts, dtype)
            assert not last.any()


def test_experts_and_rows_that_do_not_fit_are_refused(compiled):
    codes, scale = encoded(FP8Codec(), (30, 16))
    with pytest.raises(RuntimeError, match="as many rows for each expert"):
        kernels.linear_experts(torch.ones(4, 16), codes, scale, 8, torch.tensor([1, 1, 1, 1]))
    for counts in ([2, 1, 2], [5, -1, 0]):
        with pytest.raises(RuntimeError, match="add up to at most the rows"):
            kernels.linear_experts(torch.ones(4, 16), codes, scale, 8, torch.tensor(counts))
        with pytest.raises(RuntimeError, match="add up to at most the rows"):
            kernels.grad_input_experts(torch.ones(4, 10), codes, scale, 8, 16, torch.tensor(counts))
    with pytest.raises(RuntimeError, match="counts must be contiguous int64"):
        kernels.linear_experts(torch.ones(4, 16), codes, scale, 8, torch.ones(3))


@pytest.mark.parametrize("bits", [8, 6, 12])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_subnormal_codes_and_zeros_count(compiled, bits, rows):
    """Units that take subnormal numbers for zero must not: every code alone, times one."""
    codes = torch.zeros(2**bits, 1, 4 * bits // 8, dtype=torch.uint8)
    for code in range(2**bits):
        codes[code, 0] = torch.tensor(list(code.to_bytes(4 * bits // 8, "little")), dtype=torch.uint8)
    scale = torch.full((2**bits, 1), 3.0)
    weight = torch.empty(2**bits, 4)
    reference.decode(codes, scale, bits, weight)
    x = torch.ones(rows, 4, dtype=torch.bfloat16)
    assert torch.equal(kernels.linear(x, codes, scale, bits), (weight.sum(1).bfloat16()).expand(rows, -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_in_bfloat16_is_multiplied_in_float32(compiled, shape):
    weight = torch.randn(shape).bfloat16()
    for rows in (0, 1, 2, 3, 4, 7, 33, 300):
        x = torch.randn(rows, shape[1])
        y, expected = kernels.linear_bf16(x, weight), x.double() @ weight.double().T
        assert (y.dtype, y.shape) == (torch.float32, expected.shape)
        assert bool(((y.double() - expected).abs() <= 2e-6 * (x.double().abs() @ weight.double().abs().T)).all())
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    kernels.linear_bf16(x, weight.T.contiguous().T).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 6, 12])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_size_are_multiplied_as_exactly(compiled, size, bits):
    """Kernels may move a row's numbers by a power of two; none may leave the range of float32, whatever else the rows
    hold.
    """
    codec = FP8Codec(bits=bits)
    buffers = codec.encode(torch.randn(24, 80))
    weight = codec.decode(buffers, (24, 80), torch.float32)
    x = torch.randn(3, 80).mul(size)
    x[1, 1:] = 0
    x[2] *= torch.logspace(-6, 0, 80)
    smallest = (
        2e-45 if bits == 8 else 80 * 2.0**-137
    )  # codes of 6 and 12 bits come divided by up to 2**12: products may be subnormal numbers
    for rows in (x[:1], x[1:2], x[2:], x[:2], x):
        y = kernels.linear(rows, buffers[""], buffers["_scale"], bits)
        expected = rows.double() @ weight.double().T
        bound = 1e-6 * (rows.double().abs() @ weight.double().abs().T) + smallest
        assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(compiled, value):
    buffers = FP8Codec().encode(torch.ones(24, 80))
    x = torch.ones(3, 80)
    x[1, 5] = value
    for rows in (slice(0, 2), slice(0, 3)):
        y = kernels.linear(x[rows], buffers[""], buffers["_scale"], 8)
        torch.testing.assert_close(y, x[rows].sum(1, keepdim=True).expand(-1, 24), rtol=0.1, atol=0, equal_nan=True)


def test_non_contiguous_inputs(compiled):
    codec = FP8Codec(group_size=32)
    whole = codec.encode(torch.randn(3, 40, 96))
    expert = {name: buffer[1] for name, buffer in whole.items()}
    weight = codec.decode(expert, (40, 96), torch.float32)
    x = torch.randn(2, 96, 5).bfloat16().transpose(1, 2)
    exact = x.double() @ weight.double().T
    assert (codec.linear(x, expert, (40, 96)) - exact).norm() <= 1e-2 * exact.norm()
    every_other = {name: buffer[::2] for name, buffer in expert.items()}
    assert torch.equal(codec.decode(every_other, (20, 96), torch.float32), weight[::2])
    assert torch.equal(codec.encode(weight.T)[""], codec.encode(weight.T.contiguous())[""])


def test_operators_pass_torchs_own_checks():
    """Schema, fake tensors, autograd registration and AOT dispatch (torch.library.opcheck)."""
    codes, scale = encoded(FP8Codec(), (24, 40))
    x = torch.randn(3, 40, requires_grad=True)
    operators = torch.ops.arctic_fp8
    torch.library.opcheck(operators.linear, (x, codes, scale, 8))
    torch.library.opcheck(operators.linear_bf16, (x, torch.randn(24, 40).bfloat16()))
    torch.library.opcheck(operators.linear_fp8, (x, codes, scale))
    torch.library.opcheck(operators.grad_input, (torch.randn(3, 24), codes, scale, 8, 40))
    counts = torch.tensor([1, 0, 2])
    torch.library.opcheck(operators.linear_experts, (torch.randn(3, 40), codes, scale, 8, counts))
    torch.library.opcheck(
        operators.grad_input_experts, (torch.randn(3, 8), codes, scale, 8, 40, torch.tensor([1, 0, 2]))
    )
    torch.library.opcheck(operators.decode, (codes, scale, 8, torch.empty(24, 40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_rounded_by_row(compiled, dtype):
    """By the definition, and as the library multiplies FP8 numbers, which is what GPUs do."""
    codec = FP8Codec(activations="fp8")
    buffers, weight = (
        codec.encode(plain := torch.randn(48, 96)),
        codec.decode(codec.encode(plain), (48, 96), torch.float64),
    )
    x = (torch.randn(5, 96) * torch.logspace(-6, 3, 5)[:, None]).to(dtype)
    x[2] = 0
    step = (
        x.float().abs().amax(-1, keepdim=True) / 448
    )  # in float32, as in the definition: in float64 ties fall to the other side
    rounded = (x.float() / step).nan_to_num().to(torch.float8_e4m3fn)
    expected = rounded.double() * step @ weight.T
    assert expected[2].norm() == 0
    found = codec.linear(x, buffers, (48, 96))
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert ((found.double() - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()
    library = reference.scaled_product(rounded, step.float(), buffers[""], buffers["_scale"])
    assert ((library.double() - expected).norm(dim=-1) <= 1e-2 * expected.norm(dim=-1)).all()
    assert not torch.equal(found, FP8Codec().linear(x, buffers, (48, 96)))
    x = torch.randn(5, 96, requires_grad=True)
    codec.linear(x, buffers, (48, 96)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).float().expand(5, 96), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_decoded_weight():
    codec = FP8Codec(bits=12)
    buffers = codec.encode(torch.randn(24, 40))
    weight = codec.decode(buffers, (24, 40), torch.float32)
    x = torch.randn(2, 3, 40, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    codec.linear(x, buffers, (24, 40)).square().sum().backward()
    (again @ weight.T).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=2e-4)  # of sums of magnitudes about 100


def test_scratch_of_inference_serves_training():
    codec, rows = FP8Codec(), 70  # float32 and many rows: decoded into memory that is kept
    buffers = codec.encode(torch.randn(24, 40))
    with torch.inference_mode():
        expected = codec.linear(torch.ones(rows, 40), buffers, (24, 40))
    x = torch.ones(rows, 40, requires_grad=True)
    y = codec.linear(x, buffers, (24, 40))
    y.sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, codec.decode(buffers, (24, 40), torch.float32).sum(0).expand(rows, -1))


def test_a_compiled_function_has_no_breaks():
    """Without Inductor's caches: torch 2.13 keeps a graph that it vectorized for AVX-512 and compiles it for AVX2 where
    ``ATEN_CPU_CAPABILITY`` later says so, or the other way round, and its kernels then write behind their buffers."""
    codec = FP8Codec(group_size=32)
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


@pytest.mark.parametrize("environment", [{"ARCTIC_FP8_KERNELS": "reference"}, {"CXX": "/does/not/exist"}])
def test_without_compiled_kernels_everything_works(forks, environment, tmp_path):
    code = (
        "import torch; from arctic_plugins_fp8 import kernels; from arctic_plugins_fp8.codec import FP8Codec;"
        "w = torch.randn(24, 40); b = FP8Codec().encode(w); y = FP8Codec().linear(torch.eye(40), b, (24, 40));"
        "assert ((y.T - w).norm() / w.norm()) < 0.03; print(kernels.describe())"
    )
    done = forks.run(["-c", code], environment={"XDG_CACHE_HOME": str(tmp_path), **environment})
    assert "(False, 'CPU: reference in torch" in done.stdout


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_a_compiler_that_fails_leaves_the_reference_and_its_output(forks, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho version 1; [ $1 = --version ] || { echo no space left >&2; exit 3; }\n")
    compiler.chmod(0o755)
    done = forks.run(DESCRIBE, environment={"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)})
    assert "broken exited with 3" in done.stderr
    assert "no space left" in next((tmp_path / "arctic_plugins" / "kernels").glob("*.log")).read_text()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """One that takes a second, writes a line per library, and whose libraries are copies of the one that is there, with
    a cache of its own.
    """
    if obstacle():
        pytest.skip(obstacle())
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\nwhile [ "$1" != -shared ] && [ $# -gt 0 ]; '
        "do shift; done\n"
        f'[ $# -gt 0 ] && sleep 1 && echo linked >> {tmp_path}/log && while [ "$1" != -o ]; do shift; done && cp '
        f'{ops.build()} "$2"\nexit 0\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._compiler.cache_clear()
    yield tmp_path / "log"
    library._compiler.cache_clear()


def test_a_library_that_cannot_be_loaded_leaves_the_reference(forks, compiler):
    garbage = compiler.with_name("garbage")
    garbage.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ] && [ "$1" != -o ]; do shift; done\n[ $# -gt 0 ] && echo no library > '
        '"$2"\nexit 0\n'
    )
    garbage.chmod(0o755)
    done = forks.run(DESCRIBE, environment={"CXX": str(garbage), "XDG_CACHE_HOME": str(compiler.parent)})
    assert "could not be built or loaded" in done.stderr


def test_a_library_that_was_cut_is_built_again(compiler):
    whole = ops.build().read_bytes()
    assert ops.build().read_bytes() == whole
    assert compiler.read_text() == "linked\n"
    ops.build().write_bytes(whole[: len(whole) // 2])
    assert ops.build().read_bytes() == whole
    assert compiler.read_text() == "linked\n" * 2


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
@pytest.mark.parametrize(
    ("name", "message"), [("sse2", "ARCTIC_FP8_KERNELS=sse2; expected an instruction set that this processor supports")]
)
def test_unknown_instructions_are_told(forks, name, message):
    assert message in forks.run(DESCRIBE, environment={"ARCTIC_FP8_KERNELS": name}, status=None).stderr


def test_processes_that_start_together_build_once(forks, compiler):
    started = [forks.start(DESCRIBE) for _ in range(3)]
    assert all("(True, " in process.communicate()[0] for process in started)
    assert compiler.read_text() == "linked\n"


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_torchs_limit_on_instructions_is_ours():
    """Whatever of it the processor has: ``ATEN_CPU_CAPABILITY`` says how other processors would compute."""
    code = "from arctic_plugins_fp8 import kernels; print(kernels.describe()[1])"
    for capability, expected in (("default", "portable"), ("avx2", "avx2" if "avx2" in NAMES else NAMES[-1])):
        done = run_python("-c", code, environment={"ATEN_CPU_CAPABILITY": capability})
        assert f"compiled, {expected} instructions" in done.stdout, done.stderr


def test_triton_in_its_interpreter_is_bitwise_the_reference():
    """No GPU is needed: Triton interprets the kernel on CPU tensors. It reads the variable when it is imported, hence
    the process.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_python("-c", INTERPRETED, environment={"TRITON_INTERPRET": "1"})
    assert done.stdout.split() == ["180"]


INTERPRETED = """
import itertools, torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.kernels import gpu, reference
checked = 0
for bits, group, shape, dtype in itertools.product(
    (8, 6, 12), ("channel", 32, 100, 128), ((5, 33), (3, 1100), (2, 128), (1, 1), (4, 515)),
    (torch.float32, torch.bfloat16, torch.float16)
):
    codec = FP8Codec(bits=bits, group_size=group)
    codes, scale = codec.encode(torch.randn(shape)).values()
    codes.random_()
    expected, found = torch.empty(shape, dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    reference.decode(codes, scale, bits, expected)
    gpu.decode(codes, scale, bits, found)
    assert torch.equal(expected, found), (codec, shape, dtype, (expected != found).sum())
    checked += 1
print(checked)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_on_a_gpu_it_is_the_references(codec):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        codes, scale = encoded(codec, shape)
        codes.random_()
        expected, found = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype, device="cuda")
        reference.decode(codes, scale, codec.bits, expected)
        kernels.decode(codes.cuda(), scale.cuda(), codec.bits, found)
        assert torch.equal(expected, found.cpu()), (shape, dtype)
