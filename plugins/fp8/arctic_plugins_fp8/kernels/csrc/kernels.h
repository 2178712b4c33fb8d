// What the compiled kernels offer, one table per instruction set; ops.cpp chooses one when it is loaded.
#pragma once
#include <cstdint>

namespace arctic {

enum class Dtype { f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// run.operator()<D>() with D = dtype. What calls it is compiled for one instruction set each: their `run` are types of their own, and so are these.
template <typename Run> void with_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32: return run.template operator()<Dtype::f32>();
    case Dtype::bf16: return run.template operator()<Dtype::bf16>();
    case Dtype::f16: return run.template operator()<Dtype::f16>();
  }
}

// Sign, exponent (bias), mantissa bits; packed least significant bits first. `top` is the largest code, `max` its value; `unit` codes fill whole bytes.
template <int BITS> struct Format;
template <> struct Format<8> { static constexpr int mantissa = 3, bias = 7, top = 0x7E, unit = 1; static constexpr float max = 448; };
template <> struct Format<6> { static constexpr int mantissa = 2, bias = 3, top = 0x1F, unit = 4; static constexpr float max = 28; };
template <> struct Format<16> { static constexpr int mantissa = 7, bias = 127, unit = 1; };  // bfloat16, only decoded; its scales are one
template <> struct Format<12> { static constexpr int mantissa = 7, bias = 7, top = 0x7FF, unit = 2; static constexpr float max = 510; };

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

// The same for gradient_floats().
constexpr int64_t kLargestFloatGradientM = 32;

// Up to so many rows of x, linear_floats() sums along K instead of decoding panels: it decodes for every four of them, which 8 bits make cheap.
constexpr int64_t dot_rows(int bits) { return bits == 8 ? 16 : 8; }

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

  // Where a processor has no other products, those of float32; where it has, these are null. x, grad and y may be of any dtype.
  // The rows of x or grad [M, size] in blocks [from, to) of `block` rows to packed[block][size][rows of the block] (size padded to 16).
  void (*pack_floats)(Dtype, const void* x, int64_t M, int64_t size, int64_t block, int64_t from, int64_t to, float* packed) = nullptr;
  // As linear() and gradient(), of what pack_floats() made of linear_block() or even_block() rows.
  void (*linear_floats)(const Weight&, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype, void* y, int64_t N) = nullptr;
  void (*gradient_floats)(const Weight&, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype, void* y) = nullptr;
  // n numbers to and from float32.
  void (*widen)(Dtype, const void* from, int64_t n, float* to) = nullptr;
  void (*narrow)(Dtype, const float* from, int64_t n, void* to) = nullptr;
};

// Rows that are multiplied with a panel at a time: at most six, as even as they can be.
inline int64_t even_block(int64_t M) {
  const int64_t blocks = (M + 5) / 6;
  return (M + blocks - 1) / blocks;
}
inline int64_t linear_block(int64_t M, int bits) { return M <= dot_rows(bits) ? 1 : even_block(M); }

extern const Kernels avx512, avx512_bf16, amx, avx2, portable;

}  // namespace arctic
