// Formats and encoding for AVX-512. Every code of every format is exactly representable in bfloat16; the smallest nonzero value of any is 2**-13.

#include <arctic/avx512.h>

#include <limits>

#include "formats.h"

namespace arctic {
namespace {

// ---- Formats -----------------------------------------------------------------------------------------------------------------------------------

constexpr uint16_t to_bf16(float value) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16); }  // exact for the values used here

struct Tables {
  alignas(64) uint16_t subnormal8[32], value6[32], words6[32];
  alignas(64) uint8_t bytes6[64], bytes12[64];
  alignas(64) uint16_t shift6[32], shift12[32];
  alignas(64) uint32_t words12[16];
  constexpr Tables() {
    for (int i = 0; i < 32; i++) {
      // The number to add to (code << 4) to get a bfloat16: 0x3C00 (the difference of the biases, 120 << 7), except for subnormal codes.
      subnormal8[i] = i < 8 ? static_cast<uint16_t>(to_bf16(i * 0x1p-9f) - (i << 4)) : 0x3C00;
      value6[i] = to_bf16(i < 4 ? i * 0x1p-4f : (1 + (i & 3) / 4.0f) * static_cast<float>(1 << (i >> 2)) / 8);
      words6[i] = static_cast<uint16_t>(i % 8 < 3 ? 3 * (i / 8) + i % 8 : 31);
      shift6[i] = static_cast<uint16_t>(6 * (i % 8) & 7);
      shift12[i] = static_cast<uint16_t>(12 * (i % 8) & 7);
      for (int half = 0; half < 2; half++) {
        bytes6[2 * i + half] = static_cast<uint8_t>((6 * (i % 8) >> 3) + half);
        bytes12[2 * i + half] = static_cast<uint8_t>((12 * (i % 8) >> 3) + half);
      }
    }
    for (int i = 0; i < 16; i++) words12[i] = static_cast<uint32_t>(std::min(3 * (i / 4) + i % 4, 15));
  }
};
constexpr Tables tables;  // computed by the compiler: no code of this file may run at load time, as the processor may lack its instructions

// The first n codes at p (the rest zero), in 16-bit lanes: zero-extended for 6 and 12 bits, sign-extended for 8.
template <int BITS> inline __m512i load_codes(const uint8_t* p, int64_t n = kChunk) {
  if constexpr (BITS == 8) {
    return _mm512_cvtepi8_epi16(n == kChunk ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                            : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(n)), p));
  } else {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first(n * BITS / 8), p);
    if constexpr (BITS == 6) {
      const __m512i lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi16(load(tables.words6), bytes), load(tables.bytes6));
      return _mm512_and_si512(_mm512_srlv_epi16(lanes, load(tables.shift6)), _mm512_set1_epi16(0x3F));
    } else {
      const __m512i lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(load(tables.words12), bytes), load(tables.bytes12));
      return _mm512_and_si512(_mm512_srlv_epi16(lanes, load(tables.shift12)), _mm512_set1_epi16(0xFFF));
    }
  }
}

// Convert 6-bit codes to bfloat16 bits with the table of magnitudes.
inline __m512i look_up6(__m512i codes, __m512i table) {
  const __m512i magnitude = _mm512_permutexvar_epi16(codes, table);  // uses only the low 5 bits of an index
  return _mm512_or_si512(magnitude, _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x20)), 10));
}

// Convert codes to bfloat16 bits.
template <int BITS> inline __m512i to_values(__m512i codes) {
  if constexpr (BITS == 8) {
    const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi16(static_cast<short>(0x87F0)));
    const __mmask32 subnormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x78));
    return _mm512_add_epi16(moved, _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(0x3C00), subnormal, codes, load(tables.subnormal8)));
  } else if constexpr (BITS == 6) {
    return look_up6(codes, load(tables.value6));
  } else {
    const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7FF));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x800)), 4);
    __m512i value = _mm512_add_epi16(magnitude, _mm512_set1_epi16(0x3C00));
    const __mmask32 subnormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x780));
    if (__builtin_expect(subnormal != 0, 0)) {  // one vector in hundreds if weights are normally distributed
      const auto fix = [](__m256i half) {
        const __m512 number = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(half)), _mm512_set1_ps(0x1p-13f));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(number), 16));
      };
      const __m512i fixed = _mm512_inserti64x4(_mm512_castsi256_si512(fix(_mm512_castsi512_si256(magnitude))),
                                               fix(_mm512_extracti64x4_epi64(magnitude, 1)), 1);
      value = _mm512_mask_mov_epi16(value, subnormal, fixed);
    }
    return _mm512_or_si512(value, sign);
  }
}

template <int BITS> struct FP8 : Format<BITS> {
  static constexpr int id = BITS, bits = BITS;
  static __m512i load(const uint8_t* p, int64_t n = kChunk) { return load_codes<BITS>(p, n); }
  static __m512i bf16(__m512i codes) { return to_values<BITS>(codes); }
};

struct FP6 : FP8<6> {
  static __m512i scaled_table(__m512 scale) { return scaled(arctic::load(tables.value6), scale); }
  static __m512i look_up(__m512i codes, __m512i table) { return look_up6(codes, table); }
};

// ---- Encoding ----------------------------------------------------------------------------------------------------------------------------------

template <Dtype D> inline __m512 load16(const void* w, int64_t at, __mmask16 mask) {
  if constexpr (D == Dtype::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(w) + at);
  return D == Dtype::bf16 ? widen(half) : _mm512_cvtph_ps(half);
}

// The code of each value: rounded to nearest even, saturating.
template <int BITS> inline __m512i to_codes(__m512 value) {
  using F = Format<BITS>;
  constexpr int shift = 23 - F::mantissa;
  const __m512i all = _mm512_castps_si512(value), magnitude = _mm512_and_si512(all, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, shift), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(magnitude, odd), _mm512_set1_epi32((1 << (shift - 1)) - 1));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, shift), _mm512_set1_epi32((127 - F::bias) << F::mantissa));
  // Adding a constant whose last mantissa bit is one subnormal step leaves the rounded number of steps in the low bits of the sum.
  const __m512i offset = _mm512_set1_epi32((127 + 23 + 1 - F::bias - F::mantissa) << 23);
  const __m512i steps = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(offset))), offset);
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32((127 + 1 - F::bias) << 23));
  const __m512i code = _mm512_min_epi32(_mm512_mask_mov_epi32(normal, subnormal, steps), _mm512_set1_epi32(F::top));
  return _mm512_or_si512(code, _mm512_slli_epi32(_mm512_srli_epi32(all, 31), BITS - 1));
}

// Store the first n of 16 codes (whole bytes).
template <int BITS> inline void store_codes(uint8_t* to, __m512i codes, int64_t n) {
  if constexpr (BITS == 8) {
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(lanes(n)), _mm512_cvtepi32_epi8(codes));
  } else if constexpr (BITS == 6) {
    __m512i moved = _mm512_sllv_epi32(codes, _mm512_setr_epi32(0, 6, 12, 18, 0, 6, 12, 18, 0, 6, 12, 18, 0, 6, 12, 18));
    moved = _mm512_or_si512(moved, _mm512_shuffle_epi32(moved, _MM_PERM_CDAB));
    moved = _mm512_or_si512(moved, _mm512_shuffle_epi32(moved, _MM_PERM_BADC));
    const __m128i words = _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, moved));
    const __m128i bytes = _mm_shuffle_epi8(words, _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(first(n * 6 / 8)), bytes);
  } else {
    __m512i moved = _mm512_sllv_epi32(codes, _mm512_setr_epi32(0, 12, 0, 12, 0, 12, 0, 12, 0, 12, 0, 12, 0, 12, 0, 12));
    moved = _mm512_or_si512(moved, _mm512_shuffle_epi32(moved, _MM_PERM_CDAB));
    const __m256i words = _mm512_castsi512_si256(_mm512_maskz_compress_epi32(0x5555, moved));
    const __m256i bytes = _mm256_shuffle_epi8(words, _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6, 8,
                                                                      9, 10, 12, 13, 14, -1, -1, -1, -1));
    const int64_t size = n * 12 / 8;
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(first(std::min<int64_t>(size, 12))), _mm256_castsi256_si128(bytes));
    if (size > 12) _mm_mask_storeu_epi8(to + 12, static_cast<__mmask16>(first(size - 12)), _mm256_extracti128_si256(bytes, 1));
  }
}

// The value of the code of a magnitude.
template <int BITS> inline __m512 to_grid(__m512 magnitude) {
  using F = Format<BITS>;
  constexpr int shift = 23 - F::mantissa;
  const __m512i bits = _mm512_castps_si512(magnitude);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, shift), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32((1 << (shift - 1)) - 1));
  const __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(~((1 << shift) - 1))));
  const __m512 offset = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 23 + 1 - F::bias - F::mantissa) << 23));
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32((127 + 1 - F::bias) << 23));
  return _mm512_min_ps(_mm512_mask_sub_ps(normal, subnormal, _mm512_add_ps(magnitude, offset), offset), _mm512_set1_ps(F::max));
}

// The scale among step * (1 + i / candidates) for which the codes of weight[from, from + size) have the smallest squared error.
template <int BITS, Dtype D> float best_step(const void* weight, int64_t from, int64_t size, float step, int candidates) {
  float best = step, smallest = std::numeric_limits<float>::infinity();
  for (int i = 0; i < candidates; i++) {
    const float factor = 1 + static_cast<float>(i) / candidates;
    const __m512 inverse = _mm512_set1_ps(1.0f / (step * factor));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < size; k += 16) {
      const __m512 value = _mm512_mul_ps(_mm512_abs_ps(load16<D>(weight, from + k, static_cast<__mmask16>(lanes(size - k)))), inverse);
      const __m512 error = _mm512_sub_ps(to_grid<BITS>(value), value);
      sum = _mm512_fmadd_ps(error, error, sum);
    }
    const float error = _mm512_reduce_add_ps(sum) * factor * factor;
    if (error < smallest) smallest = error, best = step * factor;
  }
  return best;
}

template <int BITS, Dtype D>
bool encode_as(const Weight& w, int64_t row0, int64_t row1, const void* weight, float largest, int candidates, uint8_t* codes, float* scale) {
  for (int64_t row = row0; row < row1; row++) {
    for (int64_t group = 0; group < w.groups; group++) {
      const int64_t from = row * w.K + group * w.group, size = std::min(w.group, w.K - group * w.group);
      __m512i top = _mm512_setzero_si512();
      for (int64_t k = 0; k < size; k += 16) {
        const __m512 value = load16<D>(weight, from + k, static_cast<__mmask16>(lanes(size - k)));
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF)));
      }
      const int bits = _mm512_reduce_max_epi32(top);  // as integers, NaN and Inf are larger than every number
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      if (!(magnitude <= largest)) return false;
      float step = magnitude == 0 ? 1.0f : std::max(magnitude / Format<BITS>::max, 0x1p-126f);
      if (candidates > 1 && magnitude != 0) step = best_step<BITS, D>(weight, from, size, step, candidates);
      scale[row * w.groups + group] = step;
      const __m512 inverse = _mm512_set1_ps(1.0f / step);
      uint8_t* to = codes + row * w.row_bytes() + group * w.group_bytes();
      for (int64_t k = 0; k < w.group; k += 16, to += 2 * BITS) {  // also the padding after the last weight, as zeros
        const __m512 value = load16<D>(weight, from + k, static_cast<__mmask16>(size > k ? lanes(size - k) : 0));
        store_codes<BITS>(to, to_codes<BITS>(_mm512_mul_ps(value, inverse)), std::min<int64_t>(16, w.group - k));
      }
    }
  }
  return true;
}

template <int BITS>
bool encode_from(const Weight& w, int64_t r0, int64_t r1, Dtype d, const void* from, float largest, int candidates, uint8_t* codes, float* scale) {
  if (d == Dtype::f32) return encode_as<BITS, Dtype::f32>(w, r0, r1, from, largest, candidates, codes, scale);
  if (d == Dtype::bf16) return encode_as<BITS, Dtype::bf16>(w, r0, r1, from, largest, candidates, codes, scale);
  return encode_as<BITS, Dtype::f16>(w, r0, r1, from, largest, candidates, codes, scale);
}

bool encode(const Weight& w, int64_t r0, int64_t r1, Dtype dtype, const void* from, float largest, int candidates, uint8_t* codes, float* scale) {
  if (w.bits == 8) return encode_from<8>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
  if (w.bits == 6) return encode_from<6>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
  return encode_from<12>(w, r0, r1, dtype, from, largest, candidates, codes, scale);
}

}  // namespace

extern constinit const FP8Kernels ISA{products<Formats<FP8<8>, FP6, FP8<12>>>(ARCTIC_NAME(ISA)), encode};

}  // namespace arctic
