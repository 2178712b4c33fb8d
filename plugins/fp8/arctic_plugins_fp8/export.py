"""Export of FP8 weights to formats that stock transformers and vLLM read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Buffers, Codec, Exporter
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.formats import FORMATS

__all__ = ["CompressedTensors", "FP8Block"]

BLOCK = 128
CHECKED = 1 << 26
"""Codes that are checked at once, which bounds the memory for it."""
E4M3_MAX = FORMATS[8].max


class CompressedTensors(Exporter):
    """Exporter to ``float-quantized`` of compressed-tensors (0.17, ``compressed_tensors/compressors``).

    The format has one scale per channel and the same bytes as ``bits: 8``: ``weight float8_e4m3fn [N, K]``,
    ``weight_scale float32 [N, 1]``. Activations are not quantized, or with ``activations: fp8`` rounded per token, as
    in this project.
    """

    exact = True

    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        for name, codec in codecs.items():
            if not isinstance(codec, FP8Codec) or (codec.bits, codec.group_size) != (8, "channel"):
                raise CodecError(
                    f"{name} is encoded as {codec}",
                    expected="fp8 with bits 8 and group_size 'channel', which compressed-tensors represents exactly",
                    fix="quantize with these options, or export to fp8-block",
                )
        activations = {codec.activations for codec in codecs.values()}  # type: ignore[attr-defined]
        if len(activations) > 1:
            raise CodecError(
                "only some modules have activations 'fp8'",
                expected="all or none, as in compressed-tensors",
                fix="quantize all modules with the same activations",
            )
        number = {"num_bits": 8, "type": "float", "symmetric": True}
        group: dict[str, Any] = {"targets": ["Linear"], "weights": {**number, "strategy": "channel", "dynamic": False}}
        if "fp8" in activations:
            group["input_activations"] = {**number, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plain),
        }

    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        codes = buffers[""].reshape(shape)
        if any(bool((part & 0x7F == 0x7F).any()) for part in codes.flatten().split(CHECKED)):
            raise CodecError(
                "the weight holds 480, whose code other libraries read as NaN",
                fix="quantize the original checkpoint again",
            )
        return {
            "weight": codes.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": buffers["_scale"].reshape(-1, 1).contiguous(),
        }


class FP8Block(Exporter):
    """Exporter to the ``fp8`` format of DeepSeek-V3, with one scale per block of 128 x 128 weights.

    The format is ``weight float8_e4m3fn [N, K]`` and ``weight_scale_inv float32 [N / 128, K / 128]``; a weight is their
    product (transformers' ``finegrained_fp8.py``, vLLM's ``fp8.py``). Any codec can be exported: weights are decoded
    and encoded again, which rounds them once more. Hosts that compute in this format also quantize activations. Sizes
    above 128 that are not multiples of 128 are refused: transformers 5.19 (``Fp8Dequantize``) infers the block size by
    dividing the weight's size by that of the scale.
    """

    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(plain),
        }

    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        rows, columns = shape
        if any(size > BLOCK and size % BLOCK for size in shape):
            raise CodecError(
                f"the weight is {rows} x {columns}",
                expected=f"sizes that are multiples of {BLOCK}",
                fix="exclude the module from fp8, or export to another format",
            )
        blocks = -(-rows // BLOCK), -(-columns // BLOCK)
        weight = codec.decode(buffers, shape, torch.float32)
        padded = torch.nn.functional.pad(weight, (0, blocks[1] * BLOCK - columns, 0, blocks[0] * BLOCK - rows))
        parts = padded.view(blocks[0], BLOCK, blocks[1], BLOCK)
        top = parts.abs().amax((1, 3))
        scale = torch.where(top == 0, 1.0, top / E4M3_MAX)
        encoded = (parts / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        whole = encoded.view(torch.uint8).reshape(padded.shape)[:rows, :columns].contiguous()
        return {"weight": whole.view(torch.float8_e4m3fn), "weight_scale_inv": scale}
