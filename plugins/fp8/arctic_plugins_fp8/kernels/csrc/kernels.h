// The interface of the compiled kernels: one table per instruction set, of which ops.cpp chooses one when it is loaded.
#pragma once
#include <cstdint>

namespace arctic {

enum class Dtype { f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls run.operator()<D>() with D = dtype. Callers are compiled once per instruction set. Their `run` are distinct types, and so are these instances.
template <typename Run> void with_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32: return run.template operator()<Dtype::f32>();
    case Dtype::bf16: return run.template operator()<Dtype::bf16>();
    case Dtype::f16: return run.template operator()<Dtype::f16>();
  }
}

// Sign, exponent (bias) and mantissa bits, packed least significant bits first. `top` is the largest code, `max` its value; `unit` codes fill whole bytes.
template <int BITS> struct Format;
template <> struct Format<8> { static constexpr int mantissa = 3, bias = 7, top = 0x7E, unit = 1; static constexpr float max = 448; };
template <> struct Format<6> { static constexpr int mantissa = 2, bias = 3, top = 0x1F, unit = 4; static constexpr float max = 28; };
template <> struct Format<16> { static constexpr int mantissa = 7, bias = 127, unit = 1; };  // bfloat16, only decoded, with scales of 1
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

// The number of rows of grad up to which gradient() is faster than decoding and the library's matrix product.
constexpr int64_t kLargestGradientM = 8;

// The same for gradient_floats().
constexpr int64_t kLargestFloatGradientM = 32;

// The number of rows of x up to which linear_floats() sums along K instead of decoding panels. It then decodes for every four rows, which is cheap for 8 bits.
constexpr int64_t dot_rows(int bits) { return bits == 8 ? 16 : 8; }

struct Kernels {
  const char* name;
  // Decode rows [row0, row1), columns [k0, k1) to out[(row - row0) * ld + k - k0]; k0 must be a multiple of the group, or of 32 if there is one group.
  void (*decode)(const Weight&, int64_t row0, int64_t row1, int64_t k0, int64_t k1, Dtype, void* out, int64_t ld);
  // Encode rows [row0, row1) of the contiguous w [rows, K] into codes and scale; returns false if a value is not finite or above `largest`. Tries
  // `candidates` scales for each group; the first is the largest magnitude divided by the format's largest value.
  bool (*encode)(const Weight&, int64_t row0, int64_t row1, Dtype, const void* w, float largest, int candidates, uint8_t* codes, float* scale);
  // y[m * N + n] = sum_k x[m * K + k] * w[n, k] for n in [n0, n1), bfloat16. `packed` is the result of pack() for x, if there is a pack().
  void (*linear)(const Weight&, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N);
  // y[m * K + k] = sum_n grad[m * rows + n] * w[n, k] for k in [k0, k1), bfloat16; k0 as in decode(), M at most kLargestGradientM.
  void (*gradient)(const Weight&, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y);
  // Rearrange blocks [block0, block1) of 16 rows of x [M, K]; null if the instruction set needs no rearrangement.
  void (*pack)(const uint16_t* x, int64_t M, int64_t K, int64_t block0, int64_t block1, uint16_t* packed);
  // linear() is faster than decoding and the library's matrix product up to this many rows of x, for which n must be split at multiples of `rows`.
  int64_t largest_m;
  int64_t rows;

  // Products in float32, for processors that have no others; null for those that have. x, grad and y may be of any dtype.
  // Rearrange the rows of x or grad [M, size] in blocks [from, to) of `block` rows to packed[block][size][rows of the block] (size padded to 16).
  void (*pack_floats)(Dtype, const void* x, int64_t M, int64_t size, int64_t block, int64_t from, int64_t to, float* packed) = nullptr;
  // Like linear() and gradient(), for rows that pack_floats() rearranged in blocks of linear_block() or even_block() rows.
  void (*linear_floats)(const Weight&, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype, void* y, int64_t N) = nullptr;
  void (*gradient_floats)(const Weight&, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype, void* y) = nullptr;
  // Convert n numbers to and from float32.
  void (*widen)(Dtype, const void* from, int64_t n, float* to) = nullptr;
  void (*narrow)(Dtype, const float* from, int64_t n, void* to) = nullptr;
};

// The number of rows that are multiplied with a panel at a time: at most six, in blocks as even as possible.
inline int64_t even_block(int64_t M) {
  const int64_t blocks = (M + 5) / 6;
  return (M + blocks - 1) / blocks;
}
inline int64_t linear_block(int64_t M, int bits) { return M <= dot_rows(bits) ? 1 : even_block(M); }

extern const Kernels avx512, avx512_bf16, amx, avx2, portable;

}  // namespace arctic
