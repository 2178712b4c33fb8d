"""Export to bitsandbytes' own format, which stock transformers reads with ``BitsAndBytesConfig``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Buffers, Codec, Exporter
from arctic_plugins_bnb import ops
from arctic_plugins_bnb.codec import Int8Codec, NF4Codec

__all__ = ["BitsAndBytes"]

DTYPE = "bfloat16"
"""The dtype to which bitsandbytes decodes nf4, and in which it multiplies."""


class BitsAndBytes(Exporter):
    """Exporter to checkpoints of bitsandbytes 0.50 (``functional.py``, ``QuantState.as_dict``; ``nn/modules.py``).

    nf4 is ``weight uint8 [N * K / 2, 1]`` with ``weight.absmax float32 [N * K / 64]``, the sixteen numbers
    ``weight.quant_map``, and the rest as JSON in ``weight.quant_state.bitsandbytes__nf4``. Its blocks run over the
    flattened weight, which are those of rows if K is a multiple of 64; other sizes are refused. The scales of
    ``double_quant`` are written as float32, because bitsandbytes has one offset for all rows. int8 is ``weight int8
    [N, K]`` with ``SCB float32 [N]``.

    Decoded weights are the same bit for bit. Products are not: bitsandbytes rounds the inputs of int8 to int8 as well.
    """

    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        kinds = {type(codec) for codec in codecs.values()}
        for name, codec in codecs.items():
            if not isinstance(codec, NF4Codec | Int8Codec) or len(kinds) > 1:
                raise CodecError(
                    f"{name} is encoded as {codec.describe()}",
                    expected="bnb nf4 everywhere, or bnb int8 everywhere",
                    fix="quantize with this plugin alone, and one type",
                )
        config: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(plain)}
        if kinds == {Int8Codec}:
            return config | {"load_in_8bit": True}
        return config | {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": DTYPE,
            "bnb_4bit_quant_storage": "uint8",
        }

    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        if isinstance(codec, Int8Codec):
            return {"weight": buffers[""].reshape(shape).contiguous(), "SCB": buffers["_absmax"].flatten().contiguous()}
        if shape[1] % ops.BLOCK:
            raise CodecError(
                f"the weight has {shape[1]} inputs",
                expected=f"a multiple of {ops.BLOCK}, because blocks of bitsandbytes cross rows otherwise",
                fix="exclude the module from bnb",
            )
        scales = buffers["_absmax"], buffers.get("_absmax_scale"), buffers.get("_absmax_offset")
        state = {"quant_type": "nf4", "blocksize": ops.BLOCK, "dtype": DTYPE, "shape": list(shape)}
        return {
            "weight": buffers[""].reshape(-1, 1).contiguous(),
            "weight.absmax": ops.float_absmax(*scales).flatten().contiguous(),
            "weight.quant_map": ops.nf4_numbers(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
