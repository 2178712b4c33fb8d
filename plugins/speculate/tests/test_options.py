"""What vLLM gets, and what is refused before it starts."""

import json

import pytest
from arctic_plugins_speculate.plugin import Speculate

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, ConfigError

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 272}


def arguments(options, **others):
    return {"model": "MODEL", **Stack.from_dict({"speculate": options}).vllm_engine_args("MODEL"), **others}


def check(options, config=LLAMA, **others):
    Stack.from_dict({"speculate": options}).vllm_check(arguments(options, **others), config)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {
                "method": "custom_class",
                "model": "arctic_plugins_speculate.vllm.SuffixProposer",
                "num_speculative_tokens": 7,
                "suffix_decoding_max_tree_depth": 64,
                "suffix_decoding_max_cached_requests": 10000,
                "suffix_decoding_max_spec_factor": 4.0,
                "suffix_decoding_min_token_prob": 0.15,
            },
        ),
        (
            {"method": "ngram"},
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 3, "prompt_lookup_max": 5},
        ),
        (
            {"method": "ngram", "prompt_lookup_max": 2, "tokens": 5},
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 2},
        ),
        (
            {"method": "ngram", "prompt_lookup_min": 6},
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 6, "prompt_lookup_max": 6},
        ),
        (
            {"method": "draft", "model": "some/small"},
            {"method": "draft_model", "num_speculative_tokens": 3, "model": "some/small"},
        ),
    ],
)
def test_vllm_gets_its_own_options(options, expected):
    assert arguments(options)["speculative_config"] == expected
    check(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eagle"}, "'suffix', 'ngram' or 'draft'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"method": "ngram", "model": "x"}, "expected method 'draft' with model"),
        ({"prompt_lookup_max": 3}, "expected method 'ngram' with prompt_lookup_max"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3}, "at most prompt_lookup_max"),
        ({"method": "draft", "min_token_prob": 0.5}, "expected method 'suffix' with min_token_prob"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        Speculate.from_options(options)


def test_a_draft_model_is_of_this_machine():
    recorded = Stack.from_dict({"speculate": {"method": "draft", "model": "/home/someone/small"}}).anywhere()
    assert recorded.to_dict()["speculate"]["model"] is None
    with pytest.raises(ConfigError, match="method 'draft' and no model; .*checkpoints do not record it"):
        recorded.vllm_engine_args("MODEL")


@pytest.mark.parametrize(
    ("others", "config", "message"),
    [
        ({"runner": "pooling"}, LLAMA, "MODEL is a pooling model"),
        ({}, {"architectures": ["LlamaForSequenceClassification"]}, "MODEL is a pooling model"),
        ({"logits_processors": "mine:Processor"}, LLAMA, "--logits-processors does not work with 'speculate'"),
        ({"async_scheduling": True}, LLAMA, "--async-scheduling does not work with the method 'suffix'"),
        ({"spec_tokens": "3"}, LLAMA, r"--spec-tokens and the plugin 'speculate' both .*set plugins.speculate.tokens"),
    ],
)
def test_what_vllm_cannot_do_is_refused(others, config, message):
    with pytest.raises(ConfigError, match=message):
        check({}, config, **others)
    check({}, config, **{**others, "speculative_config": "{}"})  # the user's own takes precedence


def test_a_draft_model_that_cannot_draft(tmp_path):
    def options(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return {"method": "draft", "model": str(tmp_path)}

    check(options({"vocab_size": 272}), async_scheduling=True)
    check(options({"vocab_size": 272}), {"architectures": ["LlamaForCausalLM"], "text_config": {"vocab_size": 272}})
    check(options({"vocab_size": 300}), {})  # a model that is not here yet: vLLM compares them
    with pytest.raises(ConfigError, match=r"a vocabulary of 300 tokens; expected 272, as in the model"):
        check(options({"vocab_size": 300}))
    with pytest.raises(ConfigError, match="expected a checkpoint directory or a Hub id"):
        check({"method": "draft", "model": str(tmp_path / "none")})
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        check({"method": "draft", "model": str(tmp_path)})
