"""The ``speculate`` plugin: several tokens for each step of vLLM's engine, with unchanged answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.files import read_json
from arctic_plugins_speculate.config import SpeculateConfig

__all__ = ["Speculate"]

TOKENS: Mapping[str, int] = {"suffix": 7, "ngram": 3, "draft": 3}
"""The default of ``tokens`` for each method. docs/speculation.md has measurements."""
POOLING = (
    "Classification",
    "ClassificationModel",
    "ForTextEncoding",
    "EmbeddingModel",
    "ForRewardModeling",
    "RewardModel",
)
"""Ends of the names of model classes that vLLM does not generate text with (0.32.0, ``_SUFFIX_TO_DEFAULTS`` of
``config/model.py``).
"""
OWN_OPTIONS = ("spec_method", "spec_model", "spec_tokens")
"""vLLM's options for single keys of ``--speculative-config``; it refuses them beside that."""


class Speculate(Plugin):
    """Speculative decoding in vLLM. It fills no slot: models, training and transformers are not affected."""

    name = "speculate"
    config = SpeculateConfig

    options: SpeculateConfig

    @hookimpl
    def vllm_engine_args(self) -> Mapping[str, Any]:
        options, method = self.options, self.options.method
        config: dict[str, Any] = {"num_speculative_tokens": options.tokens or TOKENS[method]}
        if method == "suffix":
            # vLLM's own method "suffix" needs a package that does not install here; these are its options.
            config |= {
                "method": "custom_class",
                "model": "arctic_plugins_speculate.vllm.SuffixProposer",
                "suffix_decoding_min_token_prob": options.min_token_prob,
                "suffix_decoding_max_spec_factor": options.max_spec_factor,
                "suffix_decoding_max_tree_depth": options.max_tree_depth,
                "suffix_decoding_max_cached_requests": options.max_cached_requests,
            }
        elif method == "ngram":
            low, high = options.prompt_lookup_min, options.prompt_lookup_max
            low = low or min(3, high or 3)
            config |= {"method": "ngram", "prompt_lookup_min": low, "prompt_lookup_max": high or max(5, low)}
        else:
            if options.model is None:
                raise ConfigError(
                    "plugins.speculate has method 'draft' and no model",
                    expected="the directory or Hub id of a small model; checkpoints do not record it",
                    fix="""add it, for example --plugins '{"speculate": {"method": "draft", "model": "DIRECTORY"}}'""",
                )
            config |= {"method": "draft_model", "model": options.model}
        return {"speculative_config": config}

    @hookimpl
    def vllm_check(self, arguments: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
        speculative = arguments["speculative_config"]
        if not isinstance(speculative, Mapping):
            return  # the user set --speculative-config, which takes precedence
        without = f"leave '{self.name}' out"
        for name in OWN_OPTIONS:
            if name in arguments:
                raise ConfigError(
                    f"--{name.replace('_', '-')} and the plugin '{self.name}' both configure speculation",
                    expected="one of them",
                    fix=f"set plugins.{self.name}.{name.removeprefix('spec_')}, or {without}",
                )
        named = [name for name in model_config.get("architectures") or () if isinstance(name, str)]
        if arguments.get("runner") == "pooling" or any(name.endswith(POOLING) for name in named):
            raise ConfigError(
                f"'{self.name}' is for models that generate text, and {arguments['model']} is a pooling model",
                fix=without,
            )
        if arguments.get("logits_processors"):
            raise ConfigError(
                f"--logits-processors does not work with '{self.name}' in vLLM", fix=f"{without}, or these"
            )
        if arguments.get("async_scheduling") is True and self.options.method != "draft":
            raise ConfigError(
                f"--async-scheduling does not work with the method '{self.options.method}' of '{self.name}' in vLLM",
                fix="leave the option out; vLLM then schedules synchronously",
            )
        if self.options.method == "draft":
            self._check_draft(Path(speculative["model"]), model_config)

    def _check_draft(self, draft: Path, model_config: Mapping[str, Any]) -> None:
        """Raise an error if the draft model is absent, or its vocabulary is not that of ``model_config``."""
        if not draft.is_dir():
            if draft.exists() or draft.is_absolute() or len(draft.parts) != 2 or ".." in draft.parts:
                raise ConfigError(
                    f"plugins.{self.name}.model is {draft}",
                    expected="a checkpoint directory or a Hub id",
                    fix="correct it",
                )
            return  # a Hub id: vLLM compares the vocabularies
        if not (draft / "config.json").is_file():
            raise CheckpointError(
                f"{draft} has no config.json",
                expected="a directory with the draft model",
                fix=f"correct plugins.{self.name}.model",
            )
        size, expected = _vocabulary(read_json(draft / "config.json")), _vocabulary(model_config)
        if None not in (size, expected) and size != expected:
            raise ConfigError(
                f"the draft model {draft} has a vocabulary of {size} tokens",
                expected=f"{expected}, as in the model",
                fix="use a smaller model of the same family, or the method 'suffix'",
            )


def _vocabulary(config: Mapping[str, Any]) -> Any:
    """Return the size of the vocabulary in a ``config.json``, or None."""
    nested = config.get("text_config")
    return (nested if isinstance(nested, Mapping) else config).get("vocab_size")
