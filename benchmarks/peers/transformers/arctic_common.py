"""transformers' common model tests for Arctic, and for Mixtral as the control. See README.md.

The tests are those of a checkout; nothing of them is here. Its source distribution lacks two mixins that
``test_modeling_common.py`` imports: they are empty here.
"""

import sys
import types
import unittest

import transformers

for module, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    name = f"tests.{module}"
    sys.modules.setdefault(name.rpartition(".")[0], types.ModuleType(name.rpartition(".")[0]))
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], mixin, type(mixin, (), {}))

from arctic_plugins_huggingface import register  # noqa: E402
from arctic_plugins_moe.configuration import ArcticConfig  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402 - of the checkout
from transformers.models.auto import modeling_auto  # noqa: E402

register()
# The tests choose labels, and the models without a loss, by the names of classes in transformers' own tables.
TABLES = {
    "MODEL_MAPPING_NAMES": "Model",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "ForQuestionAnswering",
}
for table, kind in TABLES.items():
    getattr(modeling_auto, table)["arctic"] = f"Arctic{kind}"

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,  # grouped_mm on CPU needs strides of 16 bytes
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
CLASSES = tuple(TABLES.values())


class Tester:
    """Sizes and inputs, under the names that the tests look for."""

    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 2

    def __init__(self, config_class, base_model_class, **options):
        self.config_class, self.base_model_class, self.options = config_class, base_model_class, options

    def get_config(self):
        return self.config_class(**SIZES, **self.options)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.ne(-1).long()}


class _Common(ModelTesterMixin):
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = Tester(self.config_class, self.all_model_classes[0], **self.options)


class TestMixtral(_Common, unittest.TestCase):
    """The control."""

    config_class, options = transformers.MixtralConfig, {}
    all_model_classes = tuple(getattr(transformers, f"Mixtral{kind}") for kind in CLASSES)


def _arctic():
    from arctic_plugins_moe import hf

    return tuple(getattr(hf, f"Arctic{kind}") for kind in CLASSES)


class TestArctic(_Common, unittest.TestCase):
    """Arctic with the dense residual in every layer."""

    config_class, options = ArcticConfig, {"moe_layer_frequency": 1, "parallel_attn_mlp_res": True}
    all_model_classes = _arctic()


del ModelTesterMixin  # which pytest would otherwise collect
