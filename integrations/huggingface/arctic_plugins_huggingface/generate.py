"""Answering prompts with a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Messages", "answer", "chat", "chat_prompt"]

Messages = list[dict[str, str]]
"""A chat: messages with ``role`` and ``content``."""
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
"""Overrides the checkpoint's ``generation_config.json``: a thousand beams take the memory of a thousand answers."""


def chat(question: str, system: str | None = None) -> Messages:
    """Return the messages for the model: a system message, if any, and the user's question."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str, system: str | None = None) -> str:
    """Return ``question`` formatted by the chat template for the model to answer; unchanged if there is no template."""
    if tokenizer.chat_template is None:
        return question
    return str(tokenizer.apply_chat_template(chat(question, system), tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    system: str | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """Yield the answers to ``questions``, each preceded by the ``system`` message if any, ``batch_size`` at a time.

    Generation is greedy unless ``kwargs``, the arguments of ``generate``, specify otherwise.
    """
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(questions), batch_size):
            prompts = [chat_prompt(tokenizer, question, system) for question in questions[start : start + batch_size]]
            batch = tokenizer(
                prompts,
                return_tensors="pt",
                padding=len(prompts) > 1,
                add_special_tokens=tokenizer.chat_template is None,
            ).to(model.device)
            options = {**GREEDY, "max_new_tokens": max_new_tokens, **kwargs}
            generate = cast("GenerationMixin", model).generate  # type: ignore[misc]  # its annotated `self` is not a model
            tokens = cast("torch.Tensor", generate(**batch, **options))
            yield from tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        model.train(training)
