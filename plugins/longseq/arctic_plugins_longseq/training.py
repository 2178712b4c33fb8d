"""Sequence parallelism with the ordinary Trainer.

Read in transformers 5.19.0 (``trainer.py``, ``masking_utils.py``) and accelerate 1.15.0.

For everything except attention, a process's tokens of a text are simply its batch. Whatever averages gradients or
losses over processes (DDP, ZeRO, experts in several processes) works unchanged. Attention is a function that wraps the
model's own, and the trainer reads the same rows in all processes that share a text.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface, Trainer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arctic_plugins.errors import ConfigError
from arctic_plugins.patches import patch
from arctic_plugins_longseq.hf import causal_lm
from arctic_plugins_longseq.ulysses import Heads, Mask, SequenceGroup, Share, Whole, computing, current

if TYPE_CHECKING:
    from accelerate import Accelerator

    from arctic_plugins_longseq.plugin import LongSeq

__all__ = ["SharedTexts"]

OPTION = "plugins.longseq.sequence_parallel"


class SharedTexts(Trainer):
    """Mixin that lets ``sequence_parallel`` consecutive processes share every text.

    Batches are split when they are fetched. While they are computed, attention sees the tokens of the other processes.

    Raises:
        ConfigError: the model or the trainer needs whole texts in one process.
    """

    text_sequence: SequenceGroup
    text_groups: _Groups

    def on_attach(self, plugin: LongSeq) -> None:
        processes, model = plugin.options.sequence_parallel, causal_lm(self.model)
        _check(self, model, processes)
        sequence = SequenceGroup(processes)
        _replace_attention(model)
        _rotate_by_the_whole(model)
        if not self.is_deepspeed_enabled:  # which may have split the weights into parts that only its engine can join
            _compare(model, sequence)
        self.text_sequence, self.text_groups = sequence, _Groups(self.accelerator, sequence)
        self.args.prediction_loss_only = True
        # Rows of the dataset go to groups of processes, in the same order as to that many single processes.
        patch(
            self.accelerator,
            "prepare_data_loader",
            why="processes that share texts read as one; accelerate splits rows only for its own sequence parallelism",
            read_in="accelerate 1.15.0",
        )(functools.partial(_prepare_for_groups, self.text_groups))

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(super().get_total_train_batch_size(args)) // self.text_sequence.size

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._share, epoch_iterator), num_batches, device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with computing(cast("Share", inputs)):  # from get_batch_samples
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch = self._share(inputs)
        with computing(batch):
            loss, _, _ = super().prediction_step(model, batch, *args, **kwargs)
        # evaluation_loop resets it when it ends
        gather = type(self.accelerator).gather_for_metrics
        self.gather_function = functools.partial(gather, cast("Accelerator", self.text_groups))
        return None if loss is None else self.text_sequence.mean(loss), None, None

    def _share(self, batch: Any) -> Share:
        _check_batch(batch)
        return self.text_sequence.share(batch, self.args.device)


def _check(trainer: Trainer, model: Any, processes: int) -> None:
    config, kind = model.config.get_text_config(), type(model).__name__
    if processes > config.num_attention_heads:
        raise ConfigError(
            f"{OPTION} is {processes}, but {kind} has {config.num_attention_heads} heads",
            expected="no more processes than heads",
        )
    others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    if any(hasattr(module, "sinks") for module in model.modules()):
        others.append("attention sinks")
    if others or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{OPTION} is {processes}, but {kind} has {', '.join(others) or 'no position_ids'}",
            expected="attention to all tokens or to a sliding window, with positions",
            fix="set sequence_parallel: 1",
        )
    given = {
        "compute_metrics": trainer.compute_metrics,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "compute_loss_func": trainer.compute_loss_func,
        "label_smoothing_factor": trainer.args.label_smoothing_factor,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{OPTION} is {processes}, but {name} needs whole texts in one process", fix="leave one of them out"
            )
    if not trainer.args.average_tokens_across_devices:
        raise ConfigError(
            f"{OPTION} is {processes}, but average_tokens_across_devices is off",
            expected="a loss over all tokens",
            fix="turn it on",
        )
    if not trainer.model_accepts_loss_kwargs:
        raise ConfigError(
            f"{OPTION} is {processes}, but {kind} does not accept 'num_items_in_batch'",
            expected="a causal language model of transformers",
        )


# Attention


def _replace_attention(model: Any) -> None:
    stock = model.config._attn_implementation.removeprefix("ulysses_")
    name = f"ulysses_{stock}"
    AttentionInterface.register(name, functools.partial(_attention, stock))
    AttentionMaskInterface.register(name, functools.partial(_mask, stock))
    model.set_attn_implementation(name)


def _attention(
    stock: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    function = (
        ALL_ATTENTION_FUNCTIONS[stock]
        if stock in ALL_ATTENTION_FUNCTIONS
        else sys.modules[type(module).__module__].eager_attention_forward
    )
    whole = current()
    if whole is None:
        result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **kwargs)
        return result
    all_heads = query.shape[1]
    query, key, value, heads = whole.sequence.to_heads(query, key, value)
    if heads.shared is None:
        key, value = heads.spread(key), heads.spread(value)
    mask = _whole_mask(whole, stock, module, query, kwargs.get("sliding_window"))
    kwargs["position_ids"] = whole.positions
    out, _ = function(_ModuleOf(module, heads), query, key, value, mask, **kwargs)
    return whole.sequence.to_tokens(out, all_heads), None


class _ModuleOf:
    """An attention module whose ``num_key_value_groups`` is that of the heads in this process."""

    def __init__(self, module: Any, heads: Heads) -> None:
        self._module, self.num_key_value_groups = module, heads.shared or 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _mask(stock: str, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask of the model's own tokens, or None if attention builds the mask of the whole text."""
    if current() is not None or stock not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)
    return mask


def _whole_mask(whole: Whole, stock: str, module: Any, query_BHLD: Tensor, window: int | None) -> Mask | None:
    key = (window, query_BHLD.dtype)
    if key not in whole.masks:
        config = copy.copy(module.config)
        config._attn_implementation_internal = stock
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        if window is not None:
            config.sliding_window = window
        whole.masks[key] = create(
            config=config,
            inputs_embeds=query_BHLD[:, 0],
            attention_mask=whole.mask,
            past_key_values=None,
            position_ids=whole.positions,
        )
    return whole.masks[key]


def _rotate_by_the_whole(model: Any) -> None:
    """Make RoPE with length-dependent frequencies follow the length of the whole text.

    Such types (``dynamic``, ``longrope``) use the largest position that they are given, and a process sees only a part
    of the text.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any("dynamic" in str(kind) or kind == "longrope" for kind in kinds):
            patch(
                module,
                "forward",
                why="frequencies follow the length of the whole text, and a process sees only a part of it",
                read_in="transformers 5.19.0",
            )(_rotate)


def _rotate(
    stock: Callable[..., tuple[Tensor, Tensor]], x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    whole = current()
    if whole is None:
        return stock(x, position_ids, *args, **kwargs)
    positions = whole.positions.clamp(max=whole.positions[:, : whole.length].max())  # padding does not add length
    sequence = whole.sequence
    return tuple(part.chunk(sequence.size, 1)[sequence.rank] for part in stock(x, positions, *args, **kwargs))


@torch.no_grad()
def _compare(model: Any, sequence: SequenceGroup) -> None:
    """Raise ConfigError unless the parts of a small text have the same logits as the whole.

    They differ if tokens interact outside attention.
    """
    tokens, vocabulary = 4 * sequence.size, model.config.get_text_config().vocab_size
    ids = (torch.arange(2 * tokens, device=model.device).view(2, tokens) * 7919) % vocabulary
    positions = (
        torch.cat([torch.arange(tokens - 3), torch.arange(3)]).to(model.device).expand(2, -1)
    )  # two texts packed into a row
    training = model.training
    model.eval()
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    batch = sequence.share({"input_ids": ids, "position_ids": positions}, model.device)
    with computing(batch):
        logits = model(**batch, use_cache=False).logits
    model.train(training)
    difference = (logits - expected.chunk(sequence.size, 1)[sequence.rank]).abs().max() / expected.abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    # Products of fewer rows round differently and may move a token to another expert, but the difference is much larger
    # if tokens are not seen.
    if difference > (1e-3 if expected.dtype == torch.float32 else 0.1):
        raise ConfigError(
            f"{OPTION}: {type(model).__name__} has other logits when a text is split; they differ by "
            f"{difference:.1g} of the largest",
            expected="a model whose tokens interact only in attention from transformers' AttentionInterface",
            fix="set sequence_parallel: 1",
        )


# The Trainer


def _prepare_for_groups(groups: _Groups, stock: Any, *args: Any, **kwargs: Any) -> Any:
    return stock.__func__(groups, *args, **kwargs)


class _Groups:
    """An ``Accelerator`` that treats the processes that share a text as one."""

    dispatch_batches = False  # otherwise the first process would read and split batches for all

    def __init__(self, accelerator: Any, sequence: SequenceGroup) -> None:
        self._accelerator, self._sequence = accelerator, sequence
        self.num_processes = accelerator.num_processes // sequence.size
        self.process_index = accelerator.process_index // sequence.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        """Gather ``tensor`` from the first process of each group."""
        gathered = self._accelerator.gather(tensor)
        return gathered.view(-1, self._sequence.size, *tensor.shape)[:, 0].reshape(-1, *tensor.shape[1:])


def _check_batch(batch: Any) -> None:
    for name in ("input_ids", "attention_mask", "position_ids"):
        value = batch.get(name)
        if value is None and name == "input_ids":
            raise ConfigError(f"{OPTION}: a batch has no 'input_ids'", expected="token ids")
        if value is not None and value.ndim != 2:
            raise ConfigError(
                f"{OPTION}: '{name}' of a batch has the shape {list(value.shape)}",
                expected="[rows, length]",
                fix="leave it out",
            )
