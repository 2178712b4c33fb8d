"""Embeddings of new tokens: more rows in a model's embedding and head. Read in transformers 5.19.0."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen import FrozenModule

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["add_embeddings", "embedding_rows", "new_token_rows"]


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Return the number of embeddings of ``model``; None if it has no table of them."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def add_embeddings(model: PreTrainedModel, tokens: Collection[int]) -> None:
    """Give ``model`` an embedding for each of ``tokens``, and remember that these are to be trained.

    The embedding and the head grow if they have too few rows; see :func:`new_token_rows` for the adapter.

    Raises:
        ConfigError: the head is encoded.
    """
    rows, wanted = embedding_rows(model), max(tokens) + 1
    if rows is None or wanted > rows:
        if isinstance(model.get_output_embeddings(), FrozenModule):
            raise ConfigError(
                "tokens are to be added, and the output head, which grows with the embedding, is encoded",
                expected="a plain head",
                fix="exclude it from the plugin that encodes weights",
            )
        # Without data there is no mean.
        model.resize_token_embeddings(wanted, mean_resizing=not model.get_input_embeddings().weight.is_meta)
    model.arctic_new_tokens = tuple(sorted(tokens))  # type: ignore[assignment]  # modules are not the only attributes


def new_token_rows(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the rows that an adapter must train because their tokens are new, as PEFT's ``trainable_token_indices``.

    The result maps the name of the embedding, and of the head if it has weights of its own, to the rows. It is empty
    unless the model was loaded with ``new_tokens``.

    Raises:
        ConfigError: the head has biases, which PEFT 0.21.2 would leave out (``TrainableTokensLayer``).
    """
    tokens: tuple[int, ...] = getattr(model, "arctic_new_tokens", ())
    if not tokens:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings  # PEFT then trains both with the embedding
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"the output head of this model ({model.config.model_type}) has biases, which PEFT leaves out where it "
            "trains rows of new tokens",
            expected="a head without biases",
            fix="leave out the new tokens",
        )
    modules: list[nn.Module] = [embedding] if head is None or tied else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: list(tokens) for module in modules}
