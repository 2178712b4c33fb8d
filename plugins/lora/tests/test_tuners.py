"""PEFT's tuners over frozen weights: each is right, trained and merged, or refused before it trains."""

import copy
import pickle
import sys

import peft
import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.adapters import guard
from arctic_plugins_huggingface.adapters.layers import FrozenLoraLinear
from arctic_plugins_huggingface.adapters.lora import FrozenLoraExperts
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from arctic_plugins import Stack
from arctic_plugins.errors import ArcticError, CodecError, ConfigError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.patches import patches
from arctic_plugins.testing import MIXTURES, tiny_llama, tiny_model

IDS = torch.arange(10, 42)[None]
SOME = ["q_proj", "v_proj", "down_proj"]
ON_DISK = {"offload": {"to": "disk", "ratio": 1.0}}
BASES = {
    "8 bits": {"fp8": {}},
    "6 bits, groups": {"fp8": {"bits": 6, "group_size": 32}},
    "8 bits, no biases": {"fp8": {}},
    "8 bits, groups, on disk, no biases": {"fp8": {"group_size": 32}, **ON_DISK},
    "6 bits, on disk": {"fp8": {"bits": 6}, **ON_DISK},
    "plain, on disk": ON_DISK,
}
TUNERS = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}),
    "beft": ("BeftConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "deft": ("DeftConfig", {"r": 4}),
    "delora": ("DeloraConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50, "scaling": 30.0}),
    "frod": ("FrodConfig", {}),
    "glora": ("GloraConfig", {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 8, "gralora_k": 2}),
    "hira": ("HiraConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "lily": ("LilyConfig", {"r": 4}),
    "ln on norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "lora": ("LoraConfig", {"r": 4}),
    "lora, dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "lora, mica": ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}),
    "lora, rank-stabilized": ("LoraConfig", {"r": 4, "use_rslora": True, "init_lora_weights": "orthogonal"}),
    "miss": ("MissConfig", {"r": 8}),
    "miss bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "miss mini": ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "r": 0}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "poly": ("PolyConfig", {"r": 4}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "pvera": ("PveraConfig", {"r": 8}),
    "randlora": ("RandLoraConfig", {"r": 8}),
    "road": ("RoadConfig", {"group_size": 16}),
    "road 4": ("RoadConfig", {"group_size": 16, "variant": "road_4"}),
    "shira": ("ShiraConfig", {"r": 4}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "tokens on embeddings": (
        "TrainableTokensConfig",
        {"token_indices": [10, 11, 12], "target_modules": ["embed_tokens"]},
    ),
    "unilora": ("UniLoraConfig", {"theta_d_length": 64}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 20, "vector_length": 8}),
    "vera": ("VeraConfig", {"r": 8}),
    "waveft": ("WaveFTConfig", {"n_frequency": 50}),
}
REFUSED = {
    "ln_tuning": ("LNTuningConfig", {}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [1]}),
}
"""Those that train a copy of the weights that they target."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tuners"), attention_bias=True, mlp_bias=True, num_hidden_layers=1)


@pytest.fixture(scope="session")
def without_biases(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tuners"), num_hidden_layers=1)


@pytest.fixture(scope="session")
def loaded(checkpoint, without_biases, tmp_path_factory):
    """Gives new models, loaded once of each kind; biases are drawn, which a new model has at zero."""
    models = {}

    def load(plugins, *, biases=True):
        if (key := f"{plugins}{biases}") not in models:
            where = (
                {"offload": {**plugins["offload"], "path": str(tmp_path_factory.mktemp("disk"))}}
                if "offload" in plugins
                else {}
            )
            model, _ = load_model(checkpoint if biases else without_biases, Stack.from_dict({**plugins, **where}))
            models[key] = stir(model, lambda name, _: name.endswith("bias"))
        return copy.deepcopy(models[key])

    return load


@pytest.fixture(scope="session", params=BASES)
def base(request, loaded):
    return lambda: loaded(BASES[request.param], biases="no biases" not in request.param)


@pytest.fixture
def frozen(loaded):
    return loaded(BASES["8 bits"])


def stir(model, which):
    """Adapters start as nothing; give them something to say, the same for the same names."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if which(name, parameter):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def config_of(name, options):
    chosen = {"target_modules": SOME, "task_type": "CAUSAL_LM", **options}
    return getattr(peft, name)(**chosen)


def adapt(model, config):
    torch.manual_seed(0)
    return stir(get_peft_model(model, config), lambda _, parameter: parameter.requires_grad)


def inputs(model):
    """Poly wants to know which of its tasks a text belongs to."""
    return {"task_ids": torch.zeros(1, dtype=torch.long)} if getattr(model, "peft_type", None) == "POLY" else {}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, **inputs(model)).logits


def gradients(model):
    torch.manual_seed(1)
    model.train()(IDS, labels=IDS, **inputs(model)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def linears(model, kind=torch.nn.Linear):
    """The linear layers of the model below its adapters."""
    below = {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, kind) and name.endswith("_proj"):
            below[name] = module
    return below


def contents(model):
    """All that merging may change."""
    found = {}
    for name, layer in linears(model, FrozenLinear).items():
        found |= {f"{name}{suffix}": buffer.clone() for suffix, buffer in layer.export().items()}
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.detach().clone()
    return found


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


def rounded_sums(plain, encoded):
    """Of PEFT's merge into the decoded weights: what layers of ``encoded``, which is not merged yet, are to become;
    also put into ``plain``.
    """
    expected = {}
    for name, layer in linears(plain).items():
        below = linears(encoded, FrozenLinear)[name]
        buffers = below.export()
        if not torch.equal(layer.weight, below.decode()):
            buffers = below.codec.encode(layer.weight.detach())
            layer.weight.data = below.codec.decode(buffers, below.shape, torch.float32)
        expected |= {f"{name}{suffix}": buffer.clone() for suffix, buffer in buffers.items()}
        if layer.bias is not None:
            expected[f"{name}.bias"] = layer.bias.detach().clone()
    return expected


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_over_frozen_weights_is_what_it_is_over_the_decoded_ones(base, tuner):
    model, plain = base(), base().dequantize(torch.float32)
    of_base, before = logits(model), contents(model)
    model, plain = (adapt(one, config_of(*TUNERS[tuner])) for one in (model, plain))
    grads, expected = gradients(model), gradients(plain)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    unmerged = logits(model)
    assert not torch.allclose(unmerged, of_base, atol=1e-3), "the adapter says nothing"
    torch.testing.assert_close(unmerged, logits(plain), rtol=1e-4, atol=1e-4)
    if tuner in ("lily", "poly") or (
        tuner == "beft" and not any(layer.bias is not None for layer in linears(plain).values())
    ):  # PEFT does not merge these
        with pytest.raises((NotImplementedError, ValueError)):
            model.merge_adapter()
        assert same(contents(model), before)
        return
    plain.merge_adapter()
    torch.testing.assert_close(logits(plain), unmerged, rtol=1e-3, atol=1e-3)
    wanted = rounded_sums(plain, model)
    model.merge_adapter()
    assert same(contents(model), wanted)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    if tuner != "osf":  # PEFT does not unmerge it
        model.unmerge_adapter()
        assert same(contents(model), before)
        assert torch.equal(logits(model), unmerged)
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)
    merged = model.merge_and_unload(safe_merge=True)
    assert same(contents(merged), wanted)
    assert not any("base_layer" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-4)


def test_every_tuner_that_is_let_through_is_tried():
    assert {config_of(*TUNERS[tuner]).peft_type.value for tuner in TUNERS} >= OVER_FROZEN


@pytest.mark.parametrize("tuner", ["ia3", "psoft"])
def test_plain_peft_loads_the_adapter_over_frozen_weights(loaded, tmp_path, tuner):
    model = adapt(loaded(BASES["6 bits, groups"]), config_of(*TUNERS[tuner]))
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(loaded(BASES["6 bits, groups"]), tmp_path, **options)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
        merged = contents(again)
        again.merge_adapter()
        assert not same(contents(again), merged)


@pytest.mark.parametrize("tuner", REFUSED)
def test_a_tuner_that_trains_the_weights_is_refused_when_it_is_added(frozen, tuner):
    before = contents(frozen)
    name, options = REFUSED[tuner]
    message = rf"'default' is {tuner.upper()}, which trains a copy of encoded weights \(model.layers.0.*\.weight\); "
    with pytest.raises(ConfigError, match=message):
        adapt(frozen, config_of(name, options))
    assert same(contents(frozen), before)


@pytest.mark.parametrize(
    "config", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "CartridgeConfig"]
)
def test_prompts_need_no_weights(base, config):
    found, expected = (
        logits(adapt(model, getattr(peft, config)(num_virtual_tokens=4, task_type="CAUSAL_LM")))
        for model in (base(), base().dequantize(torch.float32))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_a_second_adapter_is_checked_as_the_first_is(checkpoint, frozen, options, variant):
    model, _ = load_model(checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4, "target_modules": ["q_proj"]}}))
    before = contents(model)
    for modules in (["q_proj"], ["v_proj"]):
        with pytest.raises(ConfigError, match=f"'b' uses {variant} over encoded weights; expected plain LoRA"):
            model.add_adapter("b", LoraConfig(r=4, target_modules=modules, **options))
    with pytest.raises(ConfigError, match=f"'default' uses {variant}"):
        get_peft_model(frozen, LoraConfig(r=4, target_modules=["q_proj"], **options))
    layer = next(module for module in model.modules() if isinstance(module, FrozenLoraLinear))
    with pytest.raises(ConfigError, match=f"'c' uses {variant}"):
        layer.update_layer("c", 4, lora_alpha=8, config=LoraConfig(r=4, **options))
    assert same(contents(model), before)
    assert set(model.peft_config) == {"default"}


def test_an_adapter_of_a_users_own_script_merges_into_the_bytes(checkpoint):
    model, _ = load_model(checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4, "target_modules": ["q_proj"]}}))
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))
    model.set_adapter("b")
    stir(model, lambda name, _: ".b." in name)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert [type(layer) for layer in layers] == [FrozenLoraLinear] * 3
    wanted = [
        layer.get_base_layer().codec.encode(layer.get_base_layer().decode() + layer.get_delta_weight("b"))
        for layer in layers
    ]
    before = contents(model)
    model.merge_adapter()
    assert all(same(layer.get_base_layer().export(), buffers) for layer, buffers in zip(layers, wanted, strict=True))
    model.unmerge_adapter()
    assert same(contents(model), before)


def test_copies_and_pickles(frozen):
    model = adapt(frozen, config_of(*TUNERS["ia3"]))
    expected, before = logits(model), contents(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)
        again.merge_adapter()
        assert not same(contents(again), before)
        again.unmerge_adapter()
        assert same(contents(again), before)
    assert same(contents(model), before)


def test_a_second_adapter_of_another_tuner_and_both_merged(frozen):
    before = contents(frozen)
    models = [
        adapt(one, config_of(*TUNERS["ia3"])) for one in (frozen, copy.deepcopy(frozen).dequantize(torch.float32))
    ]
    for one in models:
        one.add_adapter("b", config_of(*TUNERS["ia3"]))
        one.base_model.set_adapter(["default", "b"])
        stir(one, lambda name, _: name.endswith(".b"))
    model, plain = models
    plain.merge_adapter()
    wanted = rounded_sums(plain, model)
    model.merge_adapter()
    assert same(contents(model), wanted)
    model.merge_adapter()  # of nothing new
    assert same(contents(model), wanted)
    model.unmerge_adapter()
    assert same(contents(model), before)


def test_tuners_mixed_on_one_layer(frozen):
    before = contents(frozen)
    plain = copy.deepcopy(frozen).dequantize(torch.float32)
    mixed = []
    for one in (frozen, plain):
        torch.manual_seed(0)
        mixed.append(PeftMixedModel(one, config_of(*TUNERS["loha"]), "default"))
        mixed[-1].add_adapter("b", LoraConfig(r=4, target_modules=["q_proj"]))
        mixed[-1].set_adapter(["default", "b"])
        stir(mixed[-1], lambda name, _: name.endswith(".default") or ".b." in name)
    torch.testing.assert_close(*(logits(one) for one in mixed), rtol=1e-4, atol=1e-4)
    outer = next(module for module in mixed[0].modules() if isinstance(module, FrozenLoraLinear))
    outer.merge()
    outer.base_layer.merge()
    with pytest.raises(ArcticError, match="changed after an adapter had been merged into it"):
        outer.unmerge()
    outer.base_layer.unmerge()
    outer.unmerge()
    assert same(contents(frozen), before)
    with pytest.raises(ConfigError, match="'c' uses DoRA"):
        mixed[0].add_adapter("c", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_a_merge_that_overflows_changes_nothing(frozen):
    before = contents(frozen)
    model = adapt(frozen, config_of(*TUNERS["ia3"]))
    expected = logits(model)
    layer = next(module for module in model.modules() if hasattr(module, "ia3_l"))
    kept = layer.ia3_l["default"].detach().clone()
    layer.ia3_l["default"].data[0] = float("inf")
    with pytest.raises(CodecError, match=r"model\.layers\.0.*NaN, Inf"):
        model.merge_adapter()
    layer.ia3_l["default"].data = kept
    assert same(contents(model), before)
    assert torch.equal(logits(model), expected)


def test_a_layer_that_reads_the_weight_after_all_is_stopped(frozen, monkeypatch):
    model = adapt(frozen, config_of(*TUNERS["ia3"]))
    layer = next(module for module in model.modules() if hasattr(module, "ia3_l"))
    monkeypatch.setattr(type(layer).__mro__[1], "forward", lambda self, x: x @ self.get_base_layer().weight.T)
    with pytest.raises(ConfigError, match="reads the weight of a layer whose weight is encoded"):
        logits(model)


def test_copies_of_encoded_modules_are_refused(frozen):
    for options in (
        {"modules_to_save": ["mlp"]},
        {"modules_to_save": ["k_proj"]},
        {"trainable_token_indices": {"o_proj": [1]}},
    ):
        with pytest.raises(ConfigError, match=r"trains a copy of model\.layers\.0\..*, which is encoded"):
            get_peft_model(frozen, LoraConfig(target_modules=["q_proj"], **options))
    kept = get_peft_model(frozen, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    assert kept.model.model.embed_tokens.modules_to_save["default"].weight.requires_grad


def test_parameters_of_linear_modules_are_refused(frozen):
    with pytest.raises(
        ConfigError, match=r"targets weight in encoded weights \(model\.layers\.0\.self_attn\.q_proj\.weight\)"
    ):
        get_peft_model(frozen, LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))


def test_experts_are_adapted_by_lora_alone(tmp_path):
    model_type, options = MIXTURES["qwen3_moe"]
    base, _ = load_model(tiny_model(tmp_path, model_type, **options, num_hidden_layers=1), Stack.from_dict({"fp8": {}}))
    with pytest.raises(ConfigError, match="targets a whole module in encoded weights"):
        get_peft_model(copy.deepcopy(base), peft.IA3Config(target_modules=["experts"], feedforward_modules=[]))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters))
    assert sum(isinstance(module, FrozenLoraExperts) for module in model.modules()) == 2
    with pytest.raises(ConfigError, match="dropout 0.1 and adapts experts"):
        model.add_adapter(
            "b", LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], target_parameters=parameters)
        )


def test_plain_models_are_left_to_peft(loaded):
    for config in (
        LoraConfig(r=4, use_dora=True, target_modules=SOME),
        config_of(*REFUSED["hra"]),
        config_of(*TUNERS["ia3"]),
    ):
        model = adapt(loaded({}), config)
        layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
        assert len(layers) == 3
        assert all(
            getattr(sys.modules[type(layer).__module__], type(layer).__name__) is type(layer) for layer in layers
        )


def test_peft_is_guarded_also_where_it_is_imported_later(tmp_path, monkeypatch):
    (tmp_path / "tuners_of_later.py").write_text(
        "class BaseTuner:\n    def inject_adapter(self, model, adapter_name):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(guard, "_MODULE", "tuners_of_later")
    finders = len(sys.meta_path)
    guard.guard_tuners()
    guard.guard_tuners()
    assert len(sys.meta_path) == finders + 1
    import tuners_of_later

    assert len(sys.meta_path) == finders
    first = tuners_of_later.BaseTuner.inject_adapter
    assert [made.owner for made in patches() if made.name == "inject_adapter"][-1] == "tuners_of_later.BaseTuner"
    guard.guard_tuners()
    assert tuners_of_later.BaseTuner.inject_adapter is first
    monkeypatch.delitem(sys.modules, "tuners_of_later")
