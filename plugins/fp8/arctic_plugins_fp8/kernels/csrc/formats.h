// The formats of fp8 and the kernels' tables: one per instruction set.
#pragma once
#include <arctic/kernels.h>

namespace arctic {

// Sign, exponent (bias) and mantissa bits, packed least significant bits first. `top` is the largest code, `max` its value; `unit` codes fill whole bytes.
template <int BITS> struct Format;
template <> struct Format<8> { static constexpr int mantissa = 3, bias = 7, top = 0x7E, unit = 1; static constexpr float max = 448; };
template <> struct Format<6> { static constexpr int mantissa = 2, bias = 3, top = 0x1F, unit = 4; static constexpr float max = 28; };
template <> struct Format<16> { static constexpr int mantissa = 7, bias = 127, unit = 1; };  // bfloat16, only decoded, with scales of 1
template <> struct Format<12> { static constexpr int mantissa = 7, bias = 7, top = 0x7FF, unit = 2; static constexpr float max = 510; };

struct FP8Kernels : Kernels {
  // Encode rows [row0, row1) of the contiguous w [rows, K] into codes and scale; returns false if a value is not finite or above `largest`. Tries
  // `candidates` scales for each group; the first is the largest magnitude divided by the format's largest value.
  bool (*encode)(const Weight&, int64_t row0, int64_t row1, Dtype, const void* w, float largest, int candidates, uint8_t* codes, float* scale);
};

extern const FP8Kernels avx512, avx512_bf16, amx, avx2, portable;

}  // namespace arctic
