// Small vectors, which g++ and clang compile to the processor's instructions, and conversions of dtypes. Compiled once for AVX2, FMA and F16C (with intrinsics
// where compilers do not find the instruction), and once for every processor of the architecture.
#pragma once

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace arctic {
namespace {

#ifdef __AVX2__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

constexpr int kChunk = 16;  // codes that are decoded at a time
constexpr int kVectors = kChunk / kLanes;
constexpr int kWidth = 2 * kLanes;  // columns of y that are summed at a time
using Chunk = std::array<Floats, kVectors>;

template <typename T> inline T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <typename T> inline void store(void* p, T value) { std::memcpy(p, &value, sizeof value); }
inline Ints bits_of(Floats value) { return std::bit_cast<Ints>(value); }
inline Floats floats_of(Ints value) { return std::bit_cast<Floats>(value); }
inline Ints choose(Ints mask, Ints yes, Ints no) { return (yes & mask) | (no & ~mask); }
inline Floats all(float value) { return Floats{} + value; }
inline Ints all(int32_t value) { return Ints{} + value; }
inline Floats number(Ints value) { return __builtin_convertvector(value, Floats); }

inline float sum_of(Floats value) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += value[i];
  return sum;
}

// ---- Dtypes ------------------------------------------------------------------------------------------------------------------------------------

// Round magnitudes (as bits) to a narrower format, to nearest even; larger ones become `top`.
template <int MANTISSA, int BIAS> inline Ints rounded(Ints magnitude, int32_t top) {
  constexpr int shift = 23 - MANTISSA;
  const Ints normal = ((magnitude + ((magnitude >> shift) & 1) + ((1 << (shift - 1)) - 1)) >> shift) - ((127 - BIAS) << MANTISSA);
  // Adding a constant whose last mantissa bit is one subnormal step leaves the rounded number of steps in the low bits of the sum.
  const Ints offset = all((127 + 23 + 1 - BIAS - MANTISSA) << 23);
  const Ints steps = bits_of(floats_of(magnitude) + floats_of(offset)) - offset;
  const Ints code = choose(magnitude < ((127 + 1 - BIAS) << 23), steps, normal);
  return choose(code < top, code, all(top));
}

typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

template <Dtype D> inline Floats load_as(const void* from) {
  if constexpr (D == Dtype::f32) {
    return load<Floats>(from);
  } else if constexpr (D == Dtype::bf16) {
    return floats_of(__builtin_convertvector(load<Shorts>(from), Ints) << 16);
  } else {
#ifdef __AVX2__
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    const Ints half = __builtin_convertvector(load<Shorts>(from), Ints), magnitude = half & 0x7FFF;
    const Ints large = magnitude >= 0x7C00 ? all(112 << 23) : Ints{};  // infinite or NaN
    const Ints normal = (magnitude << 13) + (112 << 23) + large;
    return floats_of(choose(magnitude < 0x400, bits_of(number(magnitude) * 0x1p-24f), normal) | ((half & 0x8000) << 16));
#endif
  }
}

template <Dtype D> inline void store_as(void* to, Floats value) {
  if constexpr (D == Dtype::f32) {
    store(to, value);
  } else if constexpr (D == Dtype::bf16) {
    const Ints bits = bits_of(value), nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    const Ints narrow = choose(nan, (bits >> 16) | 0x40, (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16);
#ifdef __AVX2__
    const __m256i low = (__m256i)(narrow & 0xFFFF), both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    store(to, _mm256_castsi256_si128(both));
#else
    store(to, __builtin_convertvector(narrow, Shorts));
#endif
  } else {
#ifdef __AVX2__
    store(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const Ints bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
    const Ints narrow = choose(magnitude > 0x7F800000, all(0x7E00), rounded<10, 15>(magnitude, 0x7C00));
    store(to, __builtin_convertvector(narrow | ((bits >> 16) & 0x8000), Shorts));
#endif
  }
}

template <Dtype D> constexpr int64_t kSize = size_of(D);

// Convert n numbers from one dtype to another.
template <Dtype FROM, Dtype TO> void convert(const void* from, int64_t n, void* to) {
  const auto* in = static_cast<const char*>(from);
  auto* out = static_cast<char*>(to);
  for (; n >= kLanes; n -= kLanes, in += kLanes * kSize<FROM>, out += kLanes * kSize<TO>) store_as<TO>(out, load_as<FROM>(in));
  if (n <= 0) return;
  char last[kLanes * 4] = {}, result[kLanes * 4];
  std::memcpy(last, in, static_cast<size_t>(n * kSize<FROM>));
  store_as<TO>(result, load_as<FROM>(last));
  std::memcpy(out, result, static_cast<size_t>(n * kSize<TO>));
}

inline void widen(Dtype dtype, const void* from, int64_t n, float* to) {
  if (dtype == Dtype::bf16) return convert<Dtype::bf16, Dtype::f32>(from, n, to);
  if (dtype == Dtype::f16) return convert<Dtype::f16, Dtype::f32>(from, n, to);
  std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

inline void narrow(Dtype dtype, const float* from, int64_t n, void* to) {
  if (dtype == Dtype::bf16) return convert<Dtype::f32, Dtype::bf16>(from, n, to);
  if (dtype == Dtype::f16) return convert<Dtype::f32, Dtype::f16>(from, n, to);
  std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

inline const char* at(const void* p, Dtype dtype, int64_t i) { return static_cast<const char*>(p) + i * size_of(dtype); }
inline char* at(void* p, Dtype dtype, int64_t i) { return static_cast<char*>(p) + i * size_of(dtype); }

}  // namespace
}  // namespace arctic
