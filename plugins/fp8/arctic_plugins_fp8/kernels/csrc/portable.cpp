// Formats and encoding for every processor, compiled with -DISA=avx2 and with -DISA=portable.

#include <arctic/portable.h>

#include <limits>

#include "formats.h"

namespace arctic {
namespace {

// ---- Formats -----------------------------------------------------------------------------------------------------------------------------------

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

#else

template <int BITS> constexpr float kUnit = 1;

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

#endif

template <int BITS> struct FP8 : Format<BITS> {
  static constexpr int id = BITS, bits = BITS, kDotRows = 8;
  static constexpr int64_t kRead = kChunk * BITS / 8 + (BITS % 8 == 0 ? 0 : 4);
  static constexpr float kUnit = arctic::kUnit<BITS>;
  static Chunk values(const uint8_t* p) { return arctic::values<BITS>(p); }
#ifdef __AVX2__
  static __m256i halves(const uint8_t* p) { return arctic::halves<BITS>(p); }
  static Floats widened(__m128i half) { return arctic::widened<BITS>(half); }
#endif
};

struct E4M3 : FP8<8> {
  static constexpr int kDotRows = 16;
#ifdef __AVX2__
  // 8-bit codes, moved to their positions in a bfloat16, are the values / 2^120, which takes less than half of the instructions of converting from float16.
  // (Subnormal codes are then subnormal numbers, and zeros in a thread that set its processor to flush them.)
  static constexpr float kDotUnit = 0x1p120f;
  static constexpr int kDotChunk = 4 * kLanes;
  static std::array<Floats, 4> dot_values(const uint8_t* p) {
    const __m256i codes = load<__m256i>(p), places = _mm256_set1_epi16(static_cast<short>(0x87F0)), upper = _mm256_set1_epi32(-0x10000);
    const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(codes, 4), places);
    const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 4), places);
    const auto number = [](__m256i bits) { return _mm256_castsi256_ps(bits); };
    return {number(_mm256_slli_epi32(even, 16)), number(_mm256_slli_epi32(odd, 16)), number(_mm256_and_si256(even, upper)),
            number(_mm256_and_si256(odd, upper))};
  }
#endif
};

// ---- Encoding ----------------------------------------------------------------------------------------------------------------------------------

// Store the first n of 16 codes (whole bytes).
template <int BITS> inline void store_codes(uint8_t* to, const int32_t (&codes)[kChunk], int64_t n) {
  constexpr int unit = Format<BITS>::unit;
  uint8_t bytes[kChunk * BITS / 8];
  if constexpr (BITS == 8) {
    for (int i = 0; i < kChunk; i++) bytes[i] = static_cast<uint8_t>(codes[i]);
  } else {
    for (int i = 0; i < kChunk / unit; i++) {
      int32_t word = 0;
      for (int j = 0; j < unit; j++) word |= codes[unit * i + j] << (BITS * j);
      for (int j = 0; j < 3; j++) bytes[3 * i + j] = static_cast<uint8_t>(word >> (8 * j));
    }
  }
  std::memcpy(to, bytes, static_cast<size_t>(std::min<int64_t>(n, kChunk) * BITS / 8));
}

// The squared error of encoding the magnitudes value[0, size) (padded with zeros) with a scale.
template <int BITS> float error_of(const float* value, int64_t size, float scale) {
  using F = Format<BITS>;
  const float inverse = 1.0f / scale;
  Floats sum{};
  for (int64_t k = 0; k < size; k += kLanes) {
    const Floats scaled = load<Floats>(value + k) * inverse;
    const Ints code = rounded<F::mantissa, F::bias>(bits_of(scaled), F::top);
    const Ints normal = (code << (23 - F::mantissa)) + ((127 - F::bias) << 23);
    const Floats subnormal = number(code) * (2.0f / static_cast<float>(1 << (F::bias + F::mantissa)));
    const Floats error = floats_of(choose(code < (1 << F::mantissa), bits_of(subnormal), normal)) - scaled;
    sum += error * error;
  }
  return sum_of(sum);
}

template <int BITS>
bool encode_as(const Weight& w, int64_t row0, int64_t row1, Dtype dtype, const void* weight, float largest, int candidates, uint8_t* codes,
               float* scale) {
  using F = Format<BITS>;
  const int64_t padded = (w.group + kChunk - 1) / kChunk * kChunk;
  float *value = buffer(2 * padded), *magnitudes = value + padded;
  for (int64_t row = row0; row < row1; row++) {
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t size = std::min(w.group, w.K - group * w.group);
      widen(dtype, at(weight, dtype, row * w.K + group * w.group), size, value);
      std::fill(value + size, value + padded, 0.0f);  // also the padding after the last weight, as zeros
      Ints top{};
      for (int64_t k = 0; k < padded; k += kLanes) {
        const Ints magnitude = bits_of(load<Floats>(value + k)) & 0x7FFFFFFF;  // as integers, NaN and Inf are larger than every number
        store(magnitudes + k, magnitude);
        top = choose(magnitude > top, magnitude, top);
      }
      int32_t bits = 0;
      for (int i = 0; i < kLanes; i++) bits = std::max<int32_t>(bits, top[i]);
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      if (!(magnitude <= largest)) return false;
      float step = magnitude == 0 ? 1.0f : std::max(magnitude / F::max, 0x1p-126f);
      if (candidates > 1 && magnitude != 0) {
        float best = step, smallest = std::numeric_limits<float>::infinity();
        for (int i = 0; i < candidates; i++) {
          const float factor = 1 + static_cast<float>(i) / static_cast<float>(candidates);
          const float error = error_of<BITS>(magnitudes, padded, step * factor) * factor * factor;
          if (error < smallest) smallest = error, best = step * factor;
        }
        step = best;
      }
      scale[row * w.groups + group] = step;
      const float inverse = 1.0f / step;
      uint8_t* to = codes + row * w.row_bytes() + group * w.group_bytes();
      for (int64_t k = 0; k < w.group; k += kChunk, to += kChunk * BITS / 8) {
        int32_t found[kChunk];
        for (int i = 0; i < kChunk; i += kLanes) {
          const Ints scaled = bits_of(load<Floats>(value + k + i) * inverse);
          const Ints sign = ((scaled >> 31) & 1) << (BITS - 1);
          store(found + i, rounded<F::mantissa, F::bias>(scaled & 0x7FFFFFFF, F::top) | sign);
        }
        store_codes<BITS>(to, found, w.group - k);
      }
    }
  }
  return true;
}

bool encode(const Weight& w, int64_t r0, int64_t r1, Dtype dtype, const void* from, float largest, int candidates, uint8_t* codes, float* scale) {
  if (w.bits == 8) return encode_as<8>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
  if (w.bits == 6) return encode_as<6>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
  return encode_as<12>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
}

}  // namespace

extern constinit const FP8Kernels ISA{products<Formats<E4M3, FP8<6>, FP8<12>, FP8<16>>>(ARCTIC_NAME(ISA)), encode};

}  // namespace arctic
