"""Exported checkpoints are read by stock transformers, in a process where this project is not imported."""

import pytest
import torch
from arctic_plugins_bnb.codec import Int8Codec, NF4Codec
from arctic_plugins_bnb.export import BitsAndBytes
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints import export_checkpoint

from arctic_plugins import Stack
from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import run_python, tiny_llama

STOCK = """
import sys, torch, bitsandbytes as bnb
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
weights = {}
for name, module in model.named_modules():
    if isinstance(module, bnb.nn.Linear4bit):
        weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    elif isinstance(module, bnb.nn.Linear8bitLt):
        weights[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB[:, None])
logits = model(torch.arange(24)[None]).logits.float()
assert not any(name.startswith("arctic") for name in sys.modules), "the project was imported"
torch.save((weights, logits), sys.argv[2])
"""


@pytest.mark.parametrize("options", [{"type": "nf4"}, {"type": "nf4", "double_quant": True}, {"type": "int8"}], ids=str)
def test_stock_transformers_reads_the_same_weights(tmp_path, options):
    plain = tiny_llama(tmp_path / "plain", hidden_size=64, intermediate_size=192)
    stack = Stack.from_dict({"bnb": options})
    model, tokenizer = load_model(plain, stack, dtype=torch.bfloat16)
    save_checkpoint(model, tokenizer, tmp_path / "encoded", stack)
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "out", "bitsandbytes")
    run_python("-c", STOCK, exported, tmp_path / "found")
    weights, logits = torch.load(tmp_path / "found")
    encoded = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert set(weights) == set(encoded)
    for name, module in encoded.items():
        assert torch.equal(weights[name], module.decode(weights[name].dtype)), name
    expected = model(torch.arange(24)[None]).logits.float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_what_the_format_cannot_hold_is_refused():
    exporter = BitsAndBytes()
    with pytest.raises(CodecError, match=r"b is encoded as bnb int8.*nf4 everywhere, or bnb int8 everywhere"):
        exporter.quantization_config({"b": Int8Codec(), "a": NF4Codec()}, [])
    codec = NF4Codec()
    with pytest.raises(CodecError, match="the weight has 100 inputs; expected a multiple of 64"):
        exporter.tensors(codec, codec.encode(torch.randn(4, 100)), (4, 100))
