// Small vectors, which g++ and clang compile to the processor's instructions, and operations of the portable kernels on them: dtypes and decoding. Compiled
// once for AVX2, FMA and F16C (with intrinsics where compilers do not find the instruction), and once for every processor of the architecture.
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

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

#ifdef __AVX2__

// Values are divided by a power of two: the bits of a code move to their positions in a float16, whose bias is larger. This also widens subnormals correctly.
template <int BITS> constexpr float kUnit = BITS == 16 ? 1 : BITS == 6 ? 0x1p12f : 0x1p8f;

// The 16 codes at p as float16 bits; 16-bit codes are unchanged.
template <int BITS> inline __m256i halves(const uint8_t* p) {
  if constexpr (BITS == 16) {
    return load<__m256i>(p);
  } else if constexpr (BITS == 8) {
    const __m256i codes = _mm256_cvtepi8_epi16(load<__m128i>(p));
    return _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
  } else if constexpr (BITS == 6) {  // a product moves each code to the top of 16 bits, then it is shifted into place with its sign
    const __m256i bytes = _mm256_broadcastsi128_si256(load<__m128i>(p));
    const __m256i pairs = _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,  //
                                                                      6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12));
    const __m256i moved = _mm256_mullo_epi16(pairs, _mm256_set1_epi64x(0x0100'0040'0010'0400));
    return _mm256_and_si256(_mm256_srai_epi16(moved, 2), _mm256_set1_epi16(static_cast<short>(0x9F00)));
  } else {
    const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(p)), load<__m128i>(p + 12), 1);
    const __m256i pairs = _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,  //
                                                                      0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
    const __m256i moved = _mm256_mullo_epi16(pairs, _mm256_set1_epi32(0x0001'0010));
    return _mm256_and_si256(_mm256_srai_epi16(moved, 1), _mm256_set1_epi16(static_cast<short>(0xBFF8)));
  }
}

// Widen eight of the results of halves().
template <int BITS> inline Floats widened(__m128i half) {
  if constexpr (BITS == 16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  else return _mm256_cvtph_ps(half);
}

template <int BITS> inline Chunk values(const uint8_t* p) {
  const __m256i half = halves<BITS>(p);
  return {widened<BITS>(_mm256_castsi256_si128(half)), widened<BITS>(_mm256_extracti128_si256(half, 1))};
}

// The values that dots() multiplies, divided by kDotUnit. 8-bit codes, moved to their positions in a bfloat16, are the values / 2^120, which takes less than
// half of the instructions of converting from float16. (Subnormal codes are then subnormal numbers, and zeros in a thread that set its processor to flush
// them.) A block of kDotChunk values is in a different order, which centre() gives to x as well.
template <int BITS> constexpr float kDotUnit = BITS == 8 ? 0x1p120f : kUnit<BITS>;
template <int BITS> constexpr int kDotChunk = BITS == 8 ? 4 * kLanes : kChunk;

template <int BITS> inline std::array<Floats, kDotChunk<BITS> / kLanes> dot_values(const uint8_t* p) {
  if constexpr (BITS == 8) {
    const __m256i codes = load<__m256i>(p), places = _mm256_set1_epi16(static_cast<short>(0x87F0)), upper = _mm256_set1_epi32(-0x10000);
    const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(codes, 4), places);
    const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 4), places);
    const auto number = [](__m256i bits) { return _mm256_castsi256_ps(bits); };
    return {number(_mm256_slli_epi32(even, 16)), number(_mm256_slli_epi32(odd, 16)), number(_mm256_and_si256(even, upper)),
            number(_mm256_and_si256(odd, upper))};
  } else {
    return values<BITS>(p);
  }
}

#else

template <int BITS> constexpr float kUnit = 1;
template <int BITS> constexpr float kDotUnit = 1;

template <int BITS> inline Chunk values(const uint8_t* p) {
  using F = Format<BITS>;
  int32_t codes[kChunk];
  if constexpr (BITS == 16) {
    Chunk result;
    for (int i = 0; i < kVectors; i++) result[i] = load_as<Dtype::bf16>(p + i * kLanes * 2);
    return result;
  } else if constexpr (BITS == 8) {
    for (int i = 0; i < kChunk; i++) codes[i] = p[i];
  } else {
    for (int i = 0; i < kChunk / F::unit; i++) {
      const int32_t word = p[3 * i] | p[3 * i + 1] << 8 | p[3 * i + 2] << 16;
      for (int j = 0; j < F::unit; j++) codes[F::unit * i + j] = word >> (BITS * j) & ((1 << BITS) - 1);
    }
  }
  Chunk result;
  for (int i = 0; i < kVectors; i++) {
    const Ints code = load<Ints>(codes + i * kLanes), magnitude = code & ((1 << (BITS - 1)) - 1);
    const Ints normal = (magnitude << (23 - F::mantissa)) + ((127 - F::bias) << 23);
    const Floats subnormal = number(magnitude) * (2.0f / static_cast<float>(1 << (F::bias + F::mantissa)));
    const Ints sign = (code & (1 << (BITS - 1))) << (32 - BITS);
    result[i] = floats_of(choose(magnitude < (1 << F::mantissa), bits_of(subnormal), normal) | sign);
  }
  return result;
}

template <int BITS> constexpr int kDotChunk = kChunk;
template <int BITS> inline Chunk dot_values(const uint8_t* p) { return values<BITS>(p); }

#endif

// The number of bytes that values() reads.
template <int BITS> constexpr int64_t kRead = kChunk * BITS / 8 + (BITS % 8 == 0 ? 0 : 4);

inline const uint8_t* end_of(const Weight& w) { return w.codes + w.rows * w.row_bytes(); }

// A pointer that values() can safely read from in place of p: p, or a copy near the end of the codes.
template <int BITS> inline const uint8_t* readable(const uint8_t* p, const uint8_t* end, uint8_t (&copy)[32]) {
  if (end - p >= kRead<BITS>) return p;
  std::memset(copy, 0, sizeof copy);
  if (end > p) std::memcpy(copy, p, static_cast<size_t>(end - p));
  return copy;
}

template <int BITS> inline const uint8_t* codes_at(const Weight& w, int64_t row, int64_t group, int64_t k) {
  return w.codes + row * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * BITS / 8;
}

template <int BITS, Dtype D> void decode_as(const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, void* out, int64_t ld) {
  const uint8_t* stop = end_of(w);
  uint8_t copy[32];
  for (int64_t row = row0; row < row1; row++) {
    char* to = static_cast<char*>(out) + (row - row0) * ld * kSize<D>;
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
      const float scale = w.scale[row * w.groups + group] * kUnit<BITS>;
      const uint8_t* codes = codes_at<BITS>(w, row, group, k);
      for (; k + kChunk <= end; k += kChunk, codes += kChunk * BITS / 8, to += kChunk * kSize<D>) {
        __builtin_prefetch(codes + 2 * w.row_bytes());
        const Chunk value = values<BITS>(readable<BITS>(codes, stop, copy));
        for (int i = 0; i < kVectors; i++) store_as<D>(to + i * kLanes * kSize<D>, value[i] * scale);
      }
      if (k < end) {
        const Chunk value = values<BITS>(readable<BITS>(codes, stop, copy));
        char last[kChunk * 4];
        for (int i = 0; i < kVectors; i++) store_as<D>(last + i * kLanes * kSize<D>, value[i] * scale);
        std::memcpy(to, last, static_cast<size_t>((end - k) * kSize<D>));
        to += (end - k) * kSize<D>;
        k = end;
      }
    }
  }
}

template <int BITS> void decode_to(const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  with_dtype(dtype, [&]<Dtype D>() { decode_as<BITS, D>(w, r0, r1, k0, k1, out, ld); });
}

inline void decode(const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  if (w.bits == 8) return decode_to<8>(w, r0, r1, k0, k1, dtype, out, ld);
  if (w.bits == 6) return decode_to<6>(w, r0, r1, k0, k1, dtype, out, ld);
  if (w.bits == 16) return decode_to<16>(w, r0, r1, k0, k1, dtype, out, ld);
  return decode_to<12>(w, r0, r1, k0, k1, dtype, out, ld);
}

}  // namespace
}  // namespace arctic
