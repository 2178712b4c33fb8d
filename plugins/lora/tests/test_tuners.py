"""PEFT's tuners over frozen weights: each is right, trained and merged, or refused before it trains."""

import copy
import pickle
import sys

import peft
import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, save_checkpoint
from arctic_plugins_huggingface.adapters import guard
from arctic_plugins_huggingface.adapters.layers import FrozenLoraLinear
from arctic_plugins_huggingface.adapters.lora import FrozenLoraExperts
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from peft import LoraConfig, PeftMixedModel, PeftModel, convert_to_lora, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoTokenizer

from arctic_plugins import Stack
from arctic_plugins.adapter import OTHER_TYPES
from arctic_plugins.errors import ArcticError, CheckpointError, CodecError, ConfigError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.frozen.linear import DecodedWeight
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


PROMPTS = [
    ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4}),
    ("CartridgeConfig", {"num_virtual_tokens": 4}),
    ("CPTConfig", {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}),
]
ELSEWHERE = {
    "ADAMSS": "wants scikit-learn, which is not installed",
    "ADAPTION_PROMPT": "test_llama_adapters",
    "SHADOW": "test_shadow",
    "XLORA": "test_xlora",
}


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


@pytest.fixture(scope="session")
def base_of(loaded):
    return lambda where: loaded(BASES[where], biases="no biases" not in where)


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
    """Some tuners want to know which of their tasks a text belongs to."""
    tasks = getattr(model, "peft_type", None) in ("POLY", "MULTITASK_PROMPT_TUNING")
    return {"task_ids": torch.zeros(1, dtype=torch.long)} if tasks else {}


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


EVERYWHERE = ("8 bits", "8 bits, groups, on disk, no biases")
"""The bases over which every tuner is tried. The others are for one tuner of each kind: one that only looks at the
output of the base layer, one that reads the weight in every forward pass, one that changes biases, one that multiplies.
"""


@pytest.mark.parametrize(
    ("where", "tuner"),
    [
        (where, tuner)
        for where in BASES
        for tuner in TUNERS
        if where in EVERYWHERE or tuner in ("lora", "lora, dora", "beft", "ia3")
    ],
)
def test_a_tuner_over_frozen_weights_is_what_it_is_over_the_decoded_ones(base_of, where, tuner):
    def base():
        return base_of(where)

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


def test_every_tuner_of_peft_is_tried():
    tried = {config_of(*options).peft_type.value for options in (*TUNERS.values(), *REFUSED.values())}
    tried |= {getattr(peft, name)(task_type="CAUSAL_LM", **options).peft_type.value for name, options in PROMPTS}
    assert tried | set(ELSEWHERE) == set(PEFT_TYPE_TO_TUNER_MAPPING)
    assert tried & OTHER_TYPES == OTHER_TYPES  # what adapters' files may be of


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


@pytest.mark.parametrize(("name", "options"), PROMPTS, ids=[name for name, _ in PROMPTS])
def test_prompts_need_no_weights(frozen, name, options):
    found, expected = (
        logits(adapt(model, getattr(peft, name)(task_type="CAUSAL_LM", **options)))
        for model in (frozen, copy.deepcopy(frozen).dequantize(torch.float32))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"kasa_config": KasaConfig()},
    ],
    ids=str,
)
def test_an_initialization_that_changes_the_weights_changes_the_bytes(loaded, caplog, tmp_path, options):
    """The rest of the weight is encoded again; so the model is as far from what it was as one rounding takes it."""
    model, plain = loaded(BASES["8 bits"]), loaded(BASES["8 bits"]).dequantize(torch.float32)
    of_base, before = logits(model), contents(model)
    config = LoraConfig(r=4, target_modules=SOME, **options)
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(0)
    plain = get_peft_model(plain, copy.deepcopy(config))
    assert "changed 3 encoded weights, for example model.layers.0.self_attn.q_proj.weight" in caplog.text
    assert not same(contents(model), before)
    wanted = {
        name: below.codec.encode(linears(plain)[name].weight.detach())
        for name, below in linears(model, FrozenLinear).items()
        if name.endswith(tuple(SOME))
    }
    for name, buffers in wanted.items():
        assert same(linears(model, FrozenLinear)[name].export(), buffers)
    assert (logits(model) - of_base).norm() / of_base.norm() < 0.3
    if "niter" in str(options):  # PEFT draws numbers for it
        return
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(BASES["8 bits"]), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_corda_reads_the_decoded_weights(loaded):
    config = LoraConfig(r=4, target_modules=SOME, init_lora_weights="corda", corda_config=CordaConfig())
    models = []
    for model in (loaded(BASES["8 bits"]), loaded(BASES["8 bits"]).dequantize(torch.float32)):
        preprocess_corda(model, config, run_model=lambda model=model: logits(model))
        models.append(get_peft_model(model, config))
    for name, parameter in models[0].named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_an_adapter_is_loaded_and_merged_from_its_files(without_biases, loaded, tmp_path, tuner):
    """As ``arctic merge`` does: LoRA into the original weights, others into the ones that they were trained over."""
    stack = Stack.from_dict({"fp8": {}})
    model = adapt(loaded(BASES["8 bits"], biases=False), config_of(*TUNERS[tuner]))
    expected = logits(model)
    save_checkpoint(model, AutoTokenizer.from_pretrained(without_biases), tmp_path / "adapter", stack)
    if tuner == "poly":  # whose adapters need to be told a task with every text
        with pytest.raises(CheckpointError, match="peft_type is 'POLY'; expected LORA or one of ADALORA"):
            load_checkpoint(tmp_path / "adapter")
        return
    again, _ = load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    if tuner in ("lily", "beft"):
        with pytest.raises(CheckpointError, match=r"PEFT cannot merge .*adapter: .*; use the adapter without merging"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        return
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    assert sum(isinstance(module, FrozenLinear) for module in merged.modules()) == 7
    if model.peft_type != "LORA":
        model.merge_adapter()
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    else:
        assert (logits(merged) - expected).norm() / expected.norm() < 0.3


def test_an_adapter_becomes_one_of_lora(frozen):
    config = config_of(*TUNERS["miss bat"])
    models = [adapt(one, config) for one in (frozen, copy.deepcopy(frozen).dequantize(torch.float32))]
    found, expected = (convert_to_lora(model, rank=4)[1] for model in models)
    assert found.keys() == expected.keys()
    for module in {key.rpartition(".lora_")[0] for key in found}:
        products = [one[f"{module}.lora_B.weight"] @ one[f"{module}.lora_A.weight"] for one in (found, expected)]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)


def test_lora_ga_is_refused_before_it_computes_gradients(frozen):
    config = LoraConfig(r=4, target_modules=SOME, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    with pytest.raises(ConfigError, match=r"needs gradients of the base weights, and model\.layers\.0.* is encoded"):
        preprocess_loraga(frozen, config, train_step=lambda: None)


def test_a_second_adapter_is_checked_as_the_first_is(checkpoint, frozen):
    model, _ = load_model(checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4, "target_modules": ["q_proj"]}}))
    before = contents(model)
    with pytest.raises(ConfigError, match="'b' trains a copy of .*v_proj, which is encoded"):
        model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj"]))
    assert same(contents(model), before)
    assert set(model.peft_config) == {"default"}
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    layer = next(module for module in model.modules() if isinstance(module, FrozenLoraLinear))
    norms = layer.get_base_layer().decode().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["b"].weight, norms)


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


def test_plain_lora_decodes_nothing(frozen, monkeypatch):
    """Neither does one that only asks for shapes and dtypes."""
    monkeypatch.setattr(DecodedWeight, "read", lambda self: pytest.fail("the weight was decoded"))
    for tuner in ("lora", "ia3", "vera"):
        gradients(adapt(copy.deepcopy(frozen), config_of(*TUNERS[tuner])))
    with pytest.raises(pytest.fail.Exception, match="the weight was decoded"):
        adapt(frozen, config_of(*TUNERS["lora, dora"]))


def test_llama_adapters(tmp_path):
    """PEFT puts them around attention, and asks the layers in it for a dtype."""
    base = tiny_llama(tmp_path, head_dim=16)
    models = [load_model(base, Stack.from_dict({"fp8": {}}))[0] for _ in range(2)]
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    found, expected = (logits(adapt(model, config)) for model in (models[0], models[1].dequantize(torch.float32)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_shadow(frozen):
    found, expected = (
        logits(adapt(model, peft.ShadowConfig(task_type="CAUSAL_LM")))
        for model in (frozen, copy.deepcopy(frozen).dequantize(torch.float32))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_xlora(loaded, tmp_path):
    for name in "01":  # the only names that PEFT accepts
        adapt(loaded(BASES["8 bits"]), config_of("LoraConfig", {"r": 4})).save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in "01"}
    models = loaded(BASES["8 bits"]), loaded(BASES["8 bits"]).dequantize(torch.float32)
    results = []
    for model in models:
        model.config.use_cache = False
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=adapters)
        results.append(logits(adapt(model, config)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ConfigError, match="'b' has lora_dropout=0.1 and adapts experts"):
        model.add_adapter(
            "b", LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], target_parameters=parameters)
        )


def test_plain_models_are_left_to_peft(loaded):
    for config in (
        LoraConfig(r=4, use_dora=True, target_modules=SOME),
        config_of(*TUNERS["hra"]),
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
    assert len(sys.meta_path) == finders + 2
    import tuners_of_later

    assert len(sys.meta_path) == finders
    first = tuners_of_later.BaseTuner.inject_adapter
    assert [made.owner for made in patches() if made.name == "inject_adapter"][-1] == "tuners_of_later.BaseTuner"
    guard.guard_tuners()
    assert tuners_of_later.BaseTuner.inject_adapter is first
    monkeypatch.delitem(sys.modules, "tuners_of_later")
