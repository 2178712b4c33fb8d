// What the compiled kernels offer, one table per instruction set; ops.cpp chooses one when it is loaded.
#pragma once
#include <cstdint>

namespace arctic {

enum class Dtype { f32, bf16, f16 };

// An encoded weight [rows, K]: codes [rows, groups, group * bits / 8] bytes, scale [rows, groups], both contiguous.
struct Weight {
  const uint8_t* codes;
  const float* scale;
  int64_t rows, K, groups, group;
  int bits;

  int64_t group_bytes() const { return group * bits / 8; }
  int64_t row_bytes() const { return groups * group_bytes(); }
};

// Up to so many rows of grad, gradient() is faster than decoding and the library's matrix product.
constexpr int64_t kLargestGradientM = 8;

struct Kernels {
  const char* name;
  // Rows [row0, row1), columns [k0, k1) to out[(row - row0) * ld + k - k0]; k0 must be a multiple of the group, or of 32 when there is one group.
  void (*decode)(const Weight&, int64_t row0, int64_t row1, int64_t k0, int64_t k1, Dtype, void* out, int64_t ld);
  // Encode rows [row0, row1) of the contiguous w [rows, K] into codes and scale; false when a value is not finite or beyond `largest`. So many
  // `candidates` for each scale are tried; the first is the largest magnitude over the format's.
  bool (*encode)(const Weight&, int64_t row0, int64_t row1, Dtype, const void* w, float largest, int candidates, uint8_t* codes, float* scale);
  // y[m * N + n] = sum_k x[m * K + k] * w[n, k] for n in [n0, n1), bfloat16. `packed` is what pack() made of x, if there is a pack().
  void (*linear)(const Weight&, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N);
  // y[m * K + k] = sum_n grad[m * rows + n] * w[n, k] for k in [k0, k1), bfloat16; k0 as in decode(), M at most kLargestGradientM.
  void (*gradient)(const Weight&, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y);
  // Rearrange blocks [block0, block1) of 16 rows of x [M, K]; null when the instruction set needs no rearrangement.
  void (*pack)(const uint16_t* x, int64_t M, int64_t K, int64_t block0, int64_t block1, uint16_t* packed);
  // linear() is faster than decoding and the library's matrix product up to this many rows of x, for which n must be split at multiples of `rows`.
  int64_t largest_m;
  int64_t rows;
};

extern const Kernels avx512, avx512_bf16, amx;

}  // namespace arctic
