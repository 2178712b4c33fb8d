"""Encoded experts: what they compute, what is decoded for it, and their way from a plain checkpoint to a merged one."""

import copy
import itertools
import json

import pytest
import torch
from arctic_plugins_bnb.codec import Int8Codec, NF4Codec
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_huggingface import freeze, load_model, register, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint, export_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading.load import encoding_report
from arctic_plugins_huggingface.loading.weights import frozen_weights, weight_specs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, ClaimError, CodecError
from arctic_plugins.frozen import Codec, ExpertsDispatch, FrozenExperts, FrozenLinear, FrozenWeight, LocalTokens
from arctic_plugins.frozen.experts import _places, in_blocks, mix_experts
from arctic_plugins.testing import MIXTURES, tiny_model

E, K, I = 6, 64, 48  # noqa: E741 - as in the docstrings
FP8 = Stack.from_dict({"fp8": {}})
MIXED = Stack.from_dict(
    {
        "fp8": {
            "bits": 12,
            "formats": {"**.down_proj": {"bits": 6, "group_size": 32}, "**.gate_up_proj": {"group_size": 64}},
        }
    }
)
NF4 = Stack.from_dict({"bnb": {}})
IDS = torch.arange(10, 60)[None]


def swiglu(rows):
    gate, up = rows.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def experts(codec=FP8Codec(), *, placement=None, weights=None):  # noqa: B008 - immutable
    module = FrozenExperts(E, swiglu)
    generator = torch.Generator().manual_seed(0)
    for leaf, shape in {"gate_up_proj": (E, 2 * I, K), "down_proj": (E, K, I)}.items():
        module.add_weight(leaf, FrozenWeight(shape, codec, f"experts.{leaf}", placement), device="meta")
        module.encode((weights or {}).get(leaf, torch.randn(shape, generator=generator) / shape[-1] ** 0.5), leaf)
    return module


def routing(tokens, top=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E, generator=generator)[:top] for _ in range(tokens)])
    return index, torch.rand(tokens, top, generator=generator)


def definition(module, x, index, weights):
    """The sum of the class's docstring, a token and an expert at a time, in float64."""
    up, down = (module.decode(torch.float64, leaf) for leaf in ("gate_up_proj", "down_proj"))
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token, (its_experts, its_weights) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, weight in zip(its_experts, its_weights.double(), strict=True):
            if 0 <= expert < E:
                result[token] = result[token] + weight * (swiglu(x[token].double() @ up[expert].T) @ down[expert].T)
    return result


@pytest.mark.parametrize(
    "codec",
    [FP8Codec(), FP8Codec(bits=6, group_size=32), FP8Codec(bits=12), NF4Codec(double_quant=True), Int8Codec()],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_they_compute_the_sum_and_its_gradients(codec, tokens):
    module = experts(codec)
    x, (index, weights) = torch.randn(tokens, K, requires_grad=True), routing(tokens)
    weights.requires_grad_()
    found, grad = module(x, index, weights), torch.randn(tokens, K)
    found.backward(grad)
    again_x, again_weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = definition(module, again_x, index, again_weights)
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), again_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.grad.double(), again_weights.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("far", [False, True], ids=["on the host", "on a device"])
def test_experts_of_other_processes_add_nothing(monkeypatch, far):
    monkeypatch.setattr("arctic_plugins.frozen.experts._count_is_far", lambda device: far)
    module = experts()
    x, (index, weights) = torch.randn(9, K), routing(9)
    index[2], index[5, 0], index[7, 1] = E, -1, E + 3
    torch.testing.assert_close(
        module(x, index, weights).double(), definition(module, x, index, weights), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(module(x, torch.full_like(index, E), weights), torch.zeros(9, K))


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_a_few_experts_at_a_time_are_the_same(monkeypatch, limit):
    counts, seen = [0, 2, 1, 0, 5, 3], []
    rows, factors = torch.randn(11, 4, requires_grad=True), torch.arange(6.0)

    def products(rows, counts):
        seen.append(counts.tolist())
        return rows * factors.repeat_interleave(counts)[:, None]

    whole = in_blocks(products, rows, torch.tensor(counts), 4)
    monkeypatch.setattr("arctic_plugins.frozen.experts.BLOCK", limit * 4 * 4)
    assert torch.equal(in_blocks(products, rows, torch.tensor(counts), 4), whole)
    assert [sum(column) for column in zip(*seen[1:], strict=True)] == seen[0] == counts
    assert all(sum(block) <= limit or sum(map(bool, block)) == 1 for block in seen[1:])
    assert len(seen[1:]) == {1: 4, 3: 3, 6: 3}[limit]
    module, x, routes = experts(), torch.randn(40, K, requires_grad=True), routing(40)
    module(x, *routes).sum().backward()
    found, x.grad = x.grad, None
    monkeypatch.undo()
    module(x, *routes).sum().backward()
    torch.testing.assert_close(found, x.grad)


class Counting(FP8Codec):
    seen: list = []
    linear_experts = Codec.linear_experts

    def linear(self, x, buffers, shape):
        self.seen.append((x.shape[0], buffers["_scale"].data_ptr()))
        return super().linear(x, buffers, shape)


def test_only_experts_with_tokens_are_touched():
    module = experts(Counting())
    Counting.seen.clear()
    index = torch.tensor([[4, 1], [1, 4], [1, 5]])
    module(torch.randn(3, K), index, torch.ones(3, 2))
    up, down = (getattr(module, f"{leaf}_scale") for leaf in ("gate_up_proj", "down_proj"))
    hits = [(3, 1), (2, 4), (1, 5)]
    assert Counting.seen == [(rows, scale[expert].data_ptr()) for scale in (up, down) for rows, expert in hits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_do_not_read_idle_experts(dtype):
    module = experts()
    for leaf in ("gate_up_proj_scale", "down_proj_scale"):
        getattr(module, leaf).data[[0, 2, 3]] = torch.nan
    x = torch.randn(3, K, dtype=dtype, requires_grad=True)
    module(x, torch.tensor([[4, 1], [1, 4], [1, 5]]), torch.ones(3, 2, dtype=dtype)).sum().backward()
    assert x.grad.isfinite().all()


def test_bytes_that_change_between_forward_and_backward_are_noticed():
    module = experts()
    x = torch.randn(3, K, requires_grad=True)
    y = module(x, *routing(3))
    module.encode(torch.randn(E, K, I), "down_proj")
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


def test_to_dtype_leaves_the_bytes_and_autocast_computes_in_its_dtype():
    module, x, (index, weights) = experts(), torch.randn(4, K), routing(4)
    expected = {name: parameter.clone() for name, parameter in module.named_parameters()}
    module.to(torch.bfloat16)
    assert all(
        torch.equal(parameter, expected[name]) and parameter.dtype == expected[name].dtype
        for name, parameter in module.named_parameters()
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, index, weights).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(module)(x, index, weights), module(x, index, weights))


class Pieces(ExpertsDispatch):
    """One process, experts in pieces: what is sent is there at once."""

    size, rank = 1, 0

    def __init__(self, sizes):
        self.sizes, self.seen = sizes, []

    def local(self, num_experts):
        return slice(0, num_experts)

    def pieces(self, num_experts):
        return self.sizes

    def dispatch(self, rows_RK, counts):
        self.seen.append(counts)
        return [
            LocalTokens(own, its)
            for own, its in zip(rows_RK.split([int(own.sum()) for own in counts]), counts, strict=True)
        ]

    def sum_over_copies(self, tensor): ...

    def sum_over_parts(self, tensor): ...

    def gather(self, local): ...


@pytest.mark.parametrize("sizes", [[6], [2, 3, 1], [1] * 6], ids=str)
def test_pieces_of_experts_are_the_same(sizes):
    module, x, (index, weights) = experts(), torch.randn(40, K, requires_grad=True), routing(40)
    index[3, 1] = E
    expected = module(x, index, weights)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    module.dispatch = Pieces(sizes)
    found = module(x, index, weights)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, gradient)
    assert [len(counts) for counts in module.dispatch.seen[0]] == sizes
    assert torch.cat(module.dispatch.seen[0]).tolist() == index.flatten().bincount(minlength=E)[:E].tolist()


@pytest.mark.parametrize("sizes", [[2, 3, 1], [6]], ids=str)
def test_pieces_of_processes_are_sorted_by_piece(sizes):
    """Three processes: a process's experts of a piece stand together, those of the first process first."""
    places = _places(sizes, 3).tolist()
    sequence = sorted(range(18), key=lambda expert: places[expert])
    ends = [0, *itertools.accumulate(sizes)]
    assert sequence == [
        6 * process + expert for piece in itertools.pairwise(ends) for process in range(3) for expert in range(*piece)
    ]
    assert places[18] == 18


def test_no_rows_at_all():
    y = mix_experts(
        torch.empty(0, K), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2), E, lambda rows, counts: swiglu(rows)
    )
    assert y.shape == (0, K // 2)


@pytest.fixture(scope="module", params=MIXTURES)
def plain(request, tmp_path_factory):
    model_type, config = MIXTURES[request.param]
    return tiny_model(tmp_path_factory.mktemp(request.param) / "plain", model_type, **config)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("stack", [FP8, MIXED, NF4], ids=["channel", "mixed", "nf4"])
def test_encode_save_reload(plain, tmp_path, stack):
    model, tokenizer = load_model(plain, stack)
    reference = AutoModelForCausalLM.from_pretrained(plain, experts_implementation="eager")
    frozen = frozen_weights(model)
    assert {name for name in frozen if ".experts." in name} == {
        f"model.layers.{layer}.mlp.experts.{leaf}" for layer in range(2) for leaf in ("gate_up_proj", "down_proj")
    }
    for name, (module, leaf) in frozen.items():
        weight = reference.get_parameter(name).data
        assert 0 < (module.decode(leaf=leaf) - weight).norm() / weight.norm() < 0.1
        weight.copy_(module.decode(leaf=leaf))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)

    checkpoint = save_checkpoint(model, tokenizer, tmp_path / "out", stack)
    again, _ = load_model(checkpoint)
    states = again.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # To the bit, but for Qwen2: its plain gate of one row is summed in an order that depends on where in memory it is.
    tolerance = 2e-6 if model.config.model_type == "qwen2_moe" else 0
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=tolerance)
    register()
    stock = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=tolerance)
    assert encoding_report(again) == encoding_report(model)
    with safe_open(plain / "model.safetensors", "pt") as file:
        weights = {name for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    assert {name for name in stored if name.endswith(".weight")} == weights  # as many matrices, under the same names
    experts = [name for name in weights if ".experts." in name]
    assert all(stored[name].get_dtype() == "U8" and len(stored[name].get_shape()) == 3 for name in experts)
    scales = "_scale" if "fp8" in stack.to_dict() else "_absmax"
    assert all(len(stored[f"{name}{scales}"].get_shape()) == 2 for name in experts)

    plain_again = model.dequantize()
    assert not frozen_weights(plain_again)
    torch.testing.assert_close(logits(plain_again), logits(reference), rtol=1e-4, atol=1e-4)


def test_freezing_a_loaded_model_is_loading_it_frozen(plain, tmp_path):
    frozen = freeze(AutoModelForCausalLM.from_pretrained(plain), MIXED)
    model, tokenizer = load_model(plain, MIXED)
    assert torch.equal(logits(frozen), logits(model))
    save_checkpoint(frozen, tokenizer, tmp_path / "a", MIXED)
    save_checkpoint(model, tokenizer, tmp_path / "b", MIXED)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (
        json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
        == model.config.quantization_config.to_dict()
    )


@pytest.mark.parametrize(
    ("name", "plugin", "codec"),
    [
        *((name, {"fp8": {"group_size": 64}}, FP8Codec(group_size=64)) for name in MIXTURES),
        ("mixtral", {"bnb": {}}, NF4Codec()),
    ],
)
def test_encode_train_merge_reload(train_relative, name, plugin, codec):
    checkpoint, result, merged = train_relative(name, plugin)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapted = logits(load_checkpoint(result.directory)[0])
    again, _ = load_model(merged)
    assert {weight.codec for module, _ in frozen_weights(again).values() for weight in module.frozen.values()} == {
        codec
    }
    assert (logits(again) - adapted).norm() < (
        logits(AutoModelForCausalLM.from_pretrained(checkpoint)) - adapted
    ).norm()


def test_a_placement_holds_them_and_saving_gives_them_back(int8_plugin, plain, tmp_path):
    plugins = {"fp8": {"include": ["**.experts.*"]}}
    stack = Stack.from_dict({**plugins, "int8": {"include": ["**.experts.*"], "spool": str(tmp_path / "spool")}})
    with pytest.raises(ClaimError, match="plugins 'fp8' and 'int8' both claim"):
        load_model(plain, stack)
    spooled = Stack.from_dict({"int8": {"include": ["**.experts.*"], "spool": str(tmp_path / "spool")}})
    resident = Stack.from_dict({"int8": {"include": ["**.experts.*"]}})
    (placed, tokenizer), (model, _) = load_model(plain, spooled), load_model(plain, resident)
    assert all(module.frozen[leaf].handle is not None for module, leaf in frozen_weights(placed).values())
    # To the bit, but for Qwen2: its plain gate of one row is summed in an order that depends on where in memory it is.
    tolerance = 2e-6 if model.config.model_type == "qwen2_moe" else 0
    torch.testing.assert_close(logits(placed), logits(model), rtol=0, atol=tolerance)
    save_checkpoint(placed, tokenizer, tmp_path / "out", spooled)
    torch.testing.assert_close(logits(load_model(tmp_path / "out", resident)[0]), logits(model), rtol=0, atol=tolerance)
    x = torch.randn(3, model.config.hidden_size, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [1, 2], [0, 3]]), torch.rand(3, 2)
    outputs = [found.model.layers[0].mlp.experts(x, index, weights) for found in (placed, model)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(output.sum(), x)[0] for output in outputs))


def test_only_one_of_the_two_weights_is_an_error(plain):
    with pytest.raises(ClaimError, match=r"only one of .*experts\.gate_up_proj and .*experts\.down_proj is encoded"):
        load_model(plain, Stack.from_dict({"fp8": {"exclude": ["**.experts.down_proj", "lm_head"]}}))


def test_nan_in_an_expert_is_named(plain, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for path in plain.glob("tokenizer*"):
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CodecError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: the weight holds NaN"):
        load_model(tmp_path / "broken", FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({name: tensors[name][1:]}), r"is U8 \(\d+, 1, \d+\); expected U8"),
        (lambda tensors, name: tensors.update({f"{name}_scale": tensors[f"{name}_scale"].half()}), "is F16"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_damaged_expert_is_an_error_before_weights_are_read(plain, tmp_path, change, message):
    model, tokenizer = load_model(plain, FP8)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".1." in name and ".experts.2." in name and name.endswith(".weight"))
    change(tensors, name)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(tmp_path / "out")
    assert name in str(raised.value)


def test_what_cannot_be_encoded_is_reported_and_stays_plain(tmp_path):
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    model, _ = load_model(tiny_model(tmp_path / "plain", "gpt_oss", **config), FP8)
    assert not any(isinstance(module, FrozenExperts) for module in model.modules())
    assert any(isinstance(module, FrozenLinear) for module in model.modules())
    assert (
        "model.layers.*.mlp.experts: plain, their weights are transposed or interleaved, or have biases"
        in encoding_report(model)
    )


def test_stock_transformers_reads_exported_experts(tmp_path):
    model_type, config = MIXTURES["mixtral"]
    source = tiny_model(tmp_path / "plain", model_type, **config)
    model, tokenizer = load_model(source, FP8)
    save_checkpoint(model, tokenizer, tmp_path / "encoded", FP8)
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "out", "compressed-tensors")
    stock = AutoModelForCausalLM.from_pretrained(exported)
    for name, (module, leaf) in frozen_weights(model).items():
        if ".experts." in name:  # transformers 5.19.0 decompresses them to bfloat16, whatever the model's dtype
            assert torch.equal(stock.get_parameter(name).bfloat16(), module.decode(leaf=leaf).bfloat16()), name


def test_deepspeedfp_experts_there_and_back(tmp_path):
    model_type, config = MIXTURES["mixtral"]
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 1,
    }
    stack = Stack.from_dict({"fp8": {"group_size": 512}})
    model, tokenizer = load_model(tiny_model(tmp_path / "plain", model_type, **{**config, **sizes}), stack)
    save_checkpoint(model, tokenizer, tmp_path / "encoded", stack)
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "exported", "deepspeedfp")
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.block_sparse_moe.experts.3.w2.weight").get_shape() == [512, 516]
    assert "model.layers.*.block_sparse_moe.experts.*.w1: fp8 (bits 8, group_size 512)" in convert_checkpoint(
        exported, tmp_path / "converted", "deepspeedfp"
    )
    found, expected = load_model(tmp_path / "converted")[0], logits(model)
    assert (logits(found) - expected).norm() <= 1e-3 * expected.norm()  # zero is not a DeepSpeedFP number


def test_specs_are_those_of_the_parameters(plain):
    model = AutoModelForCausalLM.from_pretrained(plain)
    for name, spec in weight_specs(model).items():
        assert spec.shape == tuple(model.get_parameter(name if spec.experts else f"{name}.weight").shape)


def test_codecs_without_a_linear_of_their_own(plain):
    class Plain(FP8Codec):
        linear, grad_input = Codec.linear, Codec.grad_input

    x, (index, weights) = torch.randn(5, K, requires_grad=True), routing(5)
    results = []
    for codec in (FP8Codec(), Plain()):
        y = experts(codec)(x, index, weights)
        results.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
