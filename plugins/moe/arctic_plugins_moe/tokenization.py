"""Arctic's tokenizer: Llama's SentencePiece tokenizer with a ChatML template.

It follows Snowflake's ``tokenization_arctic.py`` (transformers fork, commit 2d05ff8).
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaTokenizer

__all__ = ["ArcticTokenizer"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML; a checkpoint's own template takes precedence."""


class ArcticTokenizer(LlamaTokenizer):
    """A tokenizer that reads Llama's tokenizer files (``tokenizer.json``, or SentencePiece's ``tokenizer.model``)."""

    def __init__(
        self,
        vocab: str | dict[str, int] | list[Any] | None = None,
        merges: str | list[Any] | None = None,
        *,
        legacy: bool | None = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(vocab, merges, legacy=legacy, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
