// What compiled kernels share: dtypes, formats, encoded weights, and one table of functions per instruction set, of which operators.h chooses one.
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

// The formats of a library's codes. A format is a class with
//   id    the number that a Weight names it by,
//   bits  of a code; codes are packed without gaps,
//   unit  the number of codes that fill whole bytes (the last codes of a group may be fewer only if the bytes are there),
// and, in the source file of each instruction set, functions that turn codes into numbers: see portable.h and avx512.h. The number times the scale of its
// group (times `kStep`, if the format has it) is the weight.
template <typename... F> struct Formats {
  // Call run.operator()<F>() with the format of this id.
  template <typename Run> static void with(int id, const Run& run) { (void)((id == F::id && (run.template operator()<F>(), true)) || ...); }
};

template <typename F> constexpr float kStep = [] {
  if constexpr (requires { F::kStep; }) return F::kStep;
  else return 1.0f;
}();

// An encoded weight [rows, K]: codes [rows, groups, group * bits / 8] bytes, scale [rows, groups], both contiguous.
struct Weight {
  const uint8_t* codes;
  const float* scale;
  int64_t rows, K, groups, group;
  int bits, format;

  int64_t group_bytes() const { return group * bits / 8; }
  int64_t row_bytes() const { return groups * group_bytes(); }
};

// The number of rows of grad up to which gradient() is faster than decoding and the library's matrix product.
constexpr int64_t kLargestGradientM = 8;

// The same for gradient_floats().
constexpr int64_t kLargestFloatGradientM = 32;

// The number of rows that are multiplied with a panel at a time: at most six, in blocks as even as possible.
inline int64_t even_block(int64_t M) {
  const int64_t blocks = (M + 5) / 6;
  return (M + blocks - 1) / blocks;
}

struct Kernels {
  const char* name;  // of the instruction set
  // Decode rows [row0, row1), columns [k0, k1) to out[(row - row0) * ld + k - k0]; k0 must be a multiple of the group, or of 32 if there is one group.
  void (*decode)(const Weight&, int64_t row0, int64_t row1, int64_t k0, int64_t k1, Dtype, void* out, int64_t ld);
  // y[m * N + n] = sum_k x[m * K + k] * w[n, k] for n in [n0, n1), bfloat16. `packed` is the result of pack() for x, if there is a pack(). Null if the
  // instruction set has only products in float32.
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
  // The rows in which x is packed for linear_floats(); grad is packed for gradient_floats() in even_block() rows.
  int64_t (*linear_block)(const Weight&, int64_t M) = nullptr;
  // Like linear() and gradient(), for rows that pack_floats() rearranged.
  void (*linear_floats)(const Weight&, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype, void* y, int64_t N) = nullptr;
  void (*gradient_floats)(const Weight&, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype, void* y) = nullptr;
  // Convert n numbers to and from float32.
  void (*widen)(Dtype, const void* from, int64_t n, float* to) = nullptr;
  void (*narrow)(Dtype, const float* from, int64_t n, void* to) = nullptr;
};

}  // namespace arctic

// The value of a macro as a string: the name of the instruction set that -DISA gives.
#define ARCTIC_TEXT(name) #name
#define ARCTIC_NAME(name) ARCTIC_TEXT(name)
