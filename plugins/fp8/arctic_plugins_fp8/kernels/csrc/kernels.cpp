// Kernels for AVX-512, compiled once per instruction set: -DISA=avx512 | avx512_bf16 | amx, with the flags of build.py.
//
// Every code of every format is exactly representable in bfloat16, so codes are converted to bfloat16 bits, 32 at a time, and dot products accumulate in
// float32. vdpbf16ps and the AMX unit treat subnormal inputs as zero, but no code becomes one: the smallest nonzero value of any format is 2**-13.

#include "kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

namespace arctic {
namespace {

constexpr int kChunk = 32;  // codes in a vector of 16-bit lanes

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

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

inline __mmask64 first(int64_t bytes) { return bytes >= 64 ? ~0ull : (1ull << bytes) - 1; }

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

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// Round float32 to bfloat16, to nearest even. Magnitudes below 2**-126 may become zero.
inline __m256i narrow(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16));
#endif
}

inline __m512i narrow(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
#endif
}

// sum += pairs of bfloat16 products.
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
#endif
}

// n rounded up so that the codes fill whole bytes. These bytes exist, because groups fill whole bytes.
template <int BITS> inline int64_t whole(int64_t n) { return (n + Format<BITS>::unit - 1) / Format<BITS>::unit * Format<BITS>::unit; }

inline __mmask32 lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

template <int BITS, Dtype D> void decode_as(const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, void* out, int64_t ld) {
  for (int64_t row = row0; row < row1; row++) {
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
      const __m512 scale = _mm512_set1_ps(w.scale[row * w.groups + group]);
      const uint8_t* codes = w.codes + row * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * BITS / 8;
      for (; k < end; k += kChunk, codes += kChunk * BITS / 8) {
        const int64_t n = std::min<int64_t>(kChunk, end - k);
        _mm_prefetch(reinterpret_cast<const char*>(codes) + 4 * w.row_bytes(), _MM_HINT_T0);  // four rows ahead
        const __m512i value = to_values<BITS>(load_codes<BITS>(codes, whole<BITS>(n)));
        const __m512 low = _mm512_mul_ps(widen(_mm512_castsi512_si256(value)), scale);
        const __m512 high = _mm512_mul_ps(widen(_mm512_extracti64x4_epi64(value, 1)), scale);
        const int64_t at = (row - row0) * ld + k - k0;
        if constexpr (D == Dtype::f32) {
          float* to = static_cast<float*>(out) + at;
          _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes(n)), low);
          _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes(n) >> 16), high);
        } else {
          const __m512i both = D == Dtype::bf16 ? narrow(low, high)
                                                : _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)),
                                                                     _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
          _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, lanes(n), both);
        }
      }
      k = end;
    }
  }
}

template <int BITS> void decode_to(const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  with_dtype(dtype, [&]<Dtype D>() { decode_as<BITS, D>(w, r0, r1, k0, k1, out, ld); });
}

void decode(const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  if (w.bits == 8) return decode_to<8>(w, r0, r1, k0, k1, dtype, out, ld);
  if (w.bits == 6) return decode_to<6>(w, r0, r1, k0, k1, dtype, out, ld);
  return decode_to<12>(w, r0, r1, k0, k1, dtype, out, ld);
}

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

// ---- Products ----------------------------------------------------------------------------------------------------------------------------------

// The sums of four vectors.
inline __m128 sum_each(const std::array<__m512, 4>& v) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)), high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));  // each 128 bits hold a part of the four sums
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline uint16_t rounded(float value) { return static_cast<uint16_t>(_mm256_extract_epi16(narrow(_mm512_set1_ps(value)), 0)); }

// The product with M rows of x, for ROWS rows of the weight at a time. Codes are decoded in registers, and each scale multiplies its group's sum.
template <int BITS, int ROWS, int M> void few_rows(const Weight& w, int64_t n0, const uint16_t* x, uint16_t* y, int64_t N) {
  constexpr int kChains = M == 1 ? 2 : 1;  // independent sums, if there are too few rows of x to provide them
  __m512 total[ROWS][M];
  for (auto& row : total)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  const int64_t row_bytes = w.row_bytes();
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t from = group * w.group, size = std::min(w.group, w.K - from);
    const uint8_t* codes = w.codes + n0 * row_bytes + group * w.group_bytes();
    __m512 sum[ROWS][M][kChains];
    for (auto& row : sum)
      for (auto& chains : row)
        for (auto& one : chains) one = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + kChains * kChunk <= size; k += kChains * kChunk) {
      __m512i columns[M][kChains];
      for (int m = 0; m < M; m++)
        for (int chain = 0; chain < kChains; chain++) columns[m][chain] = load(x + m * w.K + from + k + chain * kChunk);
      for (int row = 0; row < ROWS; row++) {
        const uint8_t* at = codes + row * row_bytes + k * BITS / 8;
        _mm_prefetch(reinterpret_cast<const char*>(at) + ROWS * row_bytes, _MM_HINT_T0);  // where the next rows will be read
        for (int chain = 0; chain < kChains; chain++) {
          const __m512i value = to_values<BITS>(load_codes<BITS>(at + chain * kChunk * BITS / 8));
          for (int m = 0; m < M; m++) sum[row][m][chain] = dot(sum[row][m][chain], value, columns[m][chain]);
        }
      }
    }
    for (; k < size; k += kChunk) {
      const int64_t n = std::min<int64_t>(kChunk, size - k), stored = std::min<int64_t>(kChunk, w.group - k);
      for (int row = 0; row < ROWS; row++) {
        const __m512i value = to_values<BITS>(load_codes<BITS>(codes + row * row_bytes + k * BITS / 8, stored));
        for (int m = 0; m < M; m++) sum[row][m][0] = dot(sum[row][m][0], value, _mm512_maskz_loadu_epi16(lanes(n), x + m * w.K + from + k));
      }
    }
    for (int row = 0; row < ROWS; row++) {
      const __m512 scale = _mm512_set1_ps(w.scale[(n0 + row) * w.groups + group]);
      for (int m = 0; m < M; m++) {
        const __m512 all = kChains == 2 ? _mm512_add_ps(sum[row][m][0], sum[row][m][kChains - 1]) : sum[row][m][0];
        total[row][m] = _mm512_fmadd_ps(all, scale, total[row][m]);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    if constexpr (ROWS == 1) {
      y[m * N + n0] = rounded(_mm512_reduce_add_ps(total[0][m]));
    } else {
      for (int row = 0; row < ROWS; row += 4) {
        const __m256i result = narrow(_mm512_castps128_ps512(sum_each({total[row][m], total[row + 1][m], total[row + 2][m], total[row + 3][m]})));
        std::memcpy(y + m * N + n0 + row, &result, 8);
      }
    }
  }
}

template <int BITS, int M> void few_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, uint16_t* y, int64_t N) {
  // Short rows are read eight at a time, so that memory is read from several pages at once.
  if constexpr (M <= 2)
    if (w.row_bytes() < 4096)
      for (; n0 + 8 <= n1; n0 += 8) few_rows<BITS, 8, M>(w, n0, x, y, N);
  for (; n0 + 4 <= n1; n0 += 4) few_rows<BITS, 4, M>(w, n0, x, y, N);
  for (; n0 < n1; n0++) few_rows<BITS, 1, M>(w, n0, x, y, N);
}

#ifndef __AMX_BF16__

constexpr int kRows = 4, kColumns = 4;  // kRows * kColumns sums, kColumns vectors of x and the temporaries of decoding fit in 32 registers

// The product with any number of rows of x, four at a time; codes are read from memory only once.
template <int BITS> void many_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t*, int64_t M, uint16_t* y, int64_t N) {
  for (; n0 < n1; n0 += kRows) {
    const int64_t end = std::min(n1, n0 + kRows);
    for (int64_t m = 0; m < M; m += kColumns) {
      const uint16_t* from = x + m * w.K;
      uint16_t* to = y + m * N;
      switch (M - m) {
        case 1: few_rows<BITS, 1>(w, n0, end, from, to, N); break;
        case 2: few_rows<BITS, 2>(w, n0, end, from, to, N); break;
        case 3: few_rows<BITS, 3>(w, n0, end, from, to, N); break;
        default: few_rows<BITS, kColumns>(w, n0, end, from, to, N); break;
      }
    }
  }
}

#else  // AMX: tiles of 16 rows x 32 bfloat16

constexpr int kTile = 16;

// This thread's own memory for decoded rows, kept between calls.
uint16_t* buffer(int64_t elements) {
  struct Free { void operator()(uint16_t* p) const { std::free(p); } };
  thread_local std::unique_ptr<uint16_t, Free> memory;
  thread_local int64_t size = 0;
  if (size < elements) {
    memory.reset(static_cast<uint16_t*>(std::aligned_alloc(64, static_cast<size_t>((elements * 2 + 63) / 64 * 64))));
    size = elements;
  }
  return memory.get();
}

inline int64_t padded(int64_t K) { return (K + kChunk - 1) / kChunk * kChunk; }

// bfloat16 bits times a scale, rounded.
inline __m512i scaled(__m512i values, __m512 scale) {
  return narrow(_mm512_mul_ps(widen(_mm512_castsi512_si256(values)), scale), _mm512_mul_ps(widen(_mm512_extracti64x4_epi64(values, 1)), scale));
}

// Decode rows [n0, n1), columns [k0, k1) to bfloat16, with zeros after K. The 32 columns from k are written to
// out[(n - n0) * row_stride + (k - k0) / 32 * chunk_stride].
// With one scale per row the values are left unscaled. Otherwise they are multiplied and rounded, as in decode(), and k0 is at the start of a group.
// `row` has room for one decoded row.
template <int BITS>
void values(const Weight& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, uint16_t* out, int64_t row_stride, int64_t chunk_stride,
            uint16_t* row) {
  for (int64_t n = n0; n < n1; n++, out += row_stride) {
    uint16_t* to = out;
    const uint8_t* codes = w.codes + n * w.row_bytes() + k0 * BITS / 8;  // groups follow each other without gaps
    if (w.groups > 1 && w.group % kChunk) {
      decode_as<BITS, Dtype::bf16>(w, n, n + 1, k0, std::min(k1, w.K), row, 0);
      for (int64_t k = k0; k < k1; k += kChunk, to += chunk_stride)
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(lanes(std::max<int64_t>(0, w.K - k)), row + k - k0));
      continue;
    }
    const float* scales = w.scale + n * w.groups;
    for (int64_t k = k0; k < k1;) {
      const int64_t group = w.groups > 1 ? k / w.group : 0, end = w.groups > 1 ? std::min(k1, (group + 1) * w.group) : k1;
      const __m512 scale = _mm512_set1_ps(w.groups > 1 ? scales[group] : 1.0f);
      const __m512i table = scaled(load(tables.value6), scale);  // for 6 bits: multiplying 32 magnitudes costs less than multiplying a group
      for (; k < end; k += kChunk, codes += kChunk * BITS / 8, to += chunk_stride) {
        const __m512i found = load_codes<BITS>(codes, std::clamp<int64_t>(w.groups * w.group - k, 0, kChunk));
        __m512i value;
        if constexpr (BITS == 6) value = look_up6(found, table);
        else value = w.groups > 1 ? scaled(to_values<BITS>(found), scale) : to_values<BITS>(found);
        _mm512_storeu_si512(to, value);
      }
    }
  }
}

inline float row_scale(const Weight& w, int64_t n) { return w.groups > 1 ? 1.0f : w.scale[n]; }

inline void transpose(__m512i r[16]) {  // 16 x 16 elements of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// packed[block][k / 2][16 rows of x][2]: the layout that AMX requires for its right operand, with zeros for missing rows and columns.
void pack(const uint16_t* x, int64_t M, int64_t K, int64_t block0, int64_t block1, uint16_t* packed) {
  for (int64_t block = block0; block < block1; block++) {
    for (int64_t k = 0; k < padded(K); k += kChunk) {
      __m512i rows[kTile];
      for (int64_t i = 0; i < kTile; i++)
        rows[i] = block * kTile + i < M ? _mm512_maskz_loadu_epi16(lanes(K - k), x + (block * kTile + i) * K + k) : _mm512_setzero_si512();
      transpose(rows);
      uint16_t* to = packed + block * kTile * padded(K) + k * kTile;
      for (int64_t i = 0; i < kTile; i++) _mm512_storeu_si512(to + i * kChunk, rows[i]);
    }
  }
}

// The configuration that ldtilecfg reads: palette 1, eight tiles of 16 rows of 64 bytes. Static: gcc 12 does not know that all of it is read.
alignas(64) const struct {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} tile_config;

// Write the 16 x 16 sums of a tile to y[m, n], m and n within M and rows.
inline void store(const float* sums, const float* scale, int64_t rows, int64_t M, uint16_t* y, int64_t N) {
  __m512i r[kTile];
  for (int n = 0; n < kTile; n++) r[n] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(sums + n * kTile), _mm512_set1_ps(scale[n])));
  transpose(r);
  for (int64_t m = 0; m < M; m++)
    _mm256_mask_storeu_epi16(y + m * N, static_cast<__mmask16>(lanes(rows)), narrow(_mm512_castsi512_ps(r[m])));
}

// The number of columns that are decoded at a time, so that 32 decoded rows stay in the first-level cache: a multiple of 32 and of the group.
inline int64_t block_of(const Weight& w) {
  const int64_t unit = w.groups > 1 ? std::lcm(w.group, kChunk) : kChunk, K = padded(std::max(w.K, w.group));
  return unit > 256 ? (unit > 1024 ? K : unit) : std::min(K, 256 / unit * unit);
}

// Fetches encoded rows into the cache, a few lines at a time, while the tiles are busy.
struct Prefetch {
  const uint8_t* at;
  int64_t row_bytes, bytes, left, column = 0;

  Prefetch(const uint8_t* from, int64_t row_bytes, int64_t rows, int64_t bytes) : at(from), row_bytes(row_bytes), bytes(bytes), left(rows) {}

  void lines(int64_t count) {
    for (; count > 0 && left > 0; count--) {
      _mm_prefetch(reinterpret_cast<const char*>(at) + column, _MM_HINT_T0);
      column += 64;
      if (column >= bytes) column = 0, at += row_bytes, left--;
    }
  }
};

// 2 x 2 tiles of sums += 32 rows of the weight (a) times 16 or 32 rows of x (b), over `size` columns.
template <bool TWO>
inline void multiply(const uint16_t* a, const uint16_t* b, int64_t size, int64_t b_stride, Prefetch& prefetch, int64_t lines) {
  const uint16_t *a1 = a + kTile * size, *b1 = b + b_stride;
  for (int64_t k = 0; k < size * kTile; k += kChunk * kTile) {
    _tile_loadd(4, a + k, 64);
    _tile_loadd(6, b + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1 + k, 64);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (TWO) {
      _tile_loadd(7, b1 + k, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    prefetch.lines(lines);
  }
}

template <int BITS> void many_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t*, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
  _tile_loadconfig(&tile_config);
  const int64_t ld = padded(std::max(w.K, w.group)), K = padded(w.K), step = block_of(w), pairs = (M + 2 * kTile - 1) / (2 * kTile);
  constexpr int64_t kSums = 4 * kTile * kTile;
  // Memory for two blocks of [step / 32][16 rows][32], a row, and the sums of each pair of blocks of x until all of K is done.
  uint16_t* decoded = buffer(2 * kTile * step + ld + 2 * pairs * kSums);
  uint16_t* row = decoded + 2 * kTile * step;
  float* sums = reinterpret_cast<float*>(row + ld);
  alignas(64) float scale[2 * kTile];
  for (int64_t n = n0; n < n1; n += 2 * kTile) {
    const int64_t rows = std::min<int64_t>(2 * kTile, n1 - n), low = std::min<int64_t>(rows, kTile);
    if (rows < 2 * kTile) std::memset(decoded, 0, static_cast<size_t>(2 * kTile * step) * 2);
    for (int64_t i = 0; i < 2 * kTile; i++) scale[i] = i < rows ? row_scale(w, n + i) : 0;
    for (int64_t k = 0; k < K; k += step) {
      const int64_t size = std::min(step, K - k);
      values<BITS>(w, n, n + low, k, k + size, decoded, kChunk, kTile * kChunk, row);
      if (rows > kTile) values<BITS>(w, n + kTile, n + rows, k, k + size, decoded + kTile * size, kChunk, kTile * kChunk, row);
      const bool last = k + step >= K;  // then other rows come next
      Prefetch prefetch(w.codes + (last ? n + 2 * kTile : n) * w.row_bytes() + (last ? 0 : (k + step) * BITS / 8), w.row_bytes(), last ? n1 - n - 2 * kTile : rows, step * BITS / 8);
      prefetch.left = std::min<int64_t>(prefetch.left, 2 * kTile);
      const int64_t lines = (2 * kTile * step * BITS / 8 / 64) / (pairs * size / kChunk) + 1;
      asm volatile("" ::: "memory");  // gcc 12's tile loads do not declare that they read memory
      for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t m = pair * 2 * kTile, left = std::min<int64_t>(2 * kTile, M - m);
        const bool two = left > kTile, begin = k == 0, end = k + step >= K;
        float* kept = sums + pair * kSums;
        const uint16_t* b = packed + m * K + k * kTile;
        if (begin) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else if (pairs > 1) {  // the sums of a single pair stay in the tiles
          _tile_loadd(0, kept, 64);
          _tile_loadd(1, kept + kSums / 4, 64);
          if (two) _tile_loadd(2, kept + kSums / 2, 64);
          if (two) _tile_loadd(3, kept + kSums / 4 * 3, 64);
        }
        if (two) multiply<true>(decoded, b, size, kTile * K, prefetch, lines);
        else multiply<false>(decoded, b, size, 0, prefetch, lines);
        if (!end && pairs == 1) continue;
        _tile_stored(0, kept, 64);
        _tile_stored(1, kept + kSums / 4, 64);
        if (two) _tile_stored(2, kept + kSums / 2, 64);
        if (two) _tile_stored(3, kept + kSums / 4 * 3, 64);
        if (!end) continue;
        for (int64_t part = 0; part < (two ? 4 : 2); part++) {
          const int64_t high = part % 2, from = m + part / 2 * kTile;
          store(kept + part * kSums / 4, scale + high * kTile, high ? rows - low : low, std::min<int64_t>(kTile, M - from), y + from * N + n + high * kTile, N);
        }
      }
    }
  }
  _tile_release();
}

#endif

// ---- Gradients of few rows ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kGradientColumns = 1024;  // so that their sums, and their codes in four rows, stay in a core's caches
constexpr int64_t kGradientLd = kGradientColumns + kChunk;

// sum[m, k] += sum over ROWS rows of the weight of factor[m, row] * value[row, k], for `size` columns of one group. Zeros are added after them.
template <int BITS, int M, int ROWS>
void add_rows(const uint8_t* codes, int64_t row_bytes, int64_t size, const float (*factor)[4], float* sum) {
  __m512 by[M][ROWS];
  for (int m = 0; m < M; m++)
    for (int row = 0; row < ROWS; row++) by[m][row] = _mm512_set1_ps(factor[m][row]);
  for (int64_t k = 0; k < size; k += kChunk) {
    const int64_t n = std::min<int64_t>(kChunk, whole<BITS>(size - k));
    __m512 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = _mm512_loadu_ps(sum + m * kGradientLd + k), high[m] = _mm512_loadu_ps(sum + m * kGradientLd + k + 16);
    for (int row = 0; row < ROWS; row++) {
      const uint8_t* at = codes + row * row_bytes + k * BITS / 8;
      _mm_prefetch(reinterpret_cast<const char*>(at) + ROWS * row_bytes, _MM_HINT_T0);
      const __m512i value = to_values<BITS>(load_codes<BITS>(at, n));
      const __m512 first_half = widen(_mm512_castsi512_si256(value)), second_half = widen(_mm512_extracti64x4_epi64(value, 1));
      for (int m = 0; m < M; m++) {
        low[m] = _mm512_fmadd_ps(first_half, by[m][row], low[m]);
        high[m] = _mm512_fmadd_ps(second_half, by[m][row], high[m]);
      }
    }
    for (int m = 0; m < M; m++) _mm512_storeu_ps(sum + m * kGradientLd + k, low[m]), _mm512_storeu_ps(sum + m * kGradientLd + k + 16, high[m]);
  }
}

// The same for any number of rows of grad, four at a time.
template <int BITS, int ROWS>
void add_rows(const Weight& w, int64_t n, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, float* sum) {
  for (int64_t k = k0; k < k1;) {
    const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
    const uint8_t* codes = w.codes + n * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * BITS / 8;
    for (int64_t m = 0; m < M; m += 4) {
      float factor[4][4];
      for (int64_t i = 0; i < std::min<int64_t>(4, M - m); i++)
        for (int row = 0; row < ROWS; row++) {
          const uint32_t bits = static_cast<uint32_t>(grad[(m + i) * w.rows + n + row]) << 16;
          std::memcpy(&factor[i][row], &bits, 4);
          factor[i][row] *= w.scale[(n + row) * w.groups + group];
        }
      float* to = sum + m * kGradientLd + k - k0;
      switch (M - m) {
        case 1: add_rows<BITS, 1, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        case 2: add_rows<BITS, 2, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        case 3: add_rows<BITS, 3, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        default: add_rows<BITS, 4, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
      }
    }
    k = end;
  }
}

template <int BITS> void gradient_of(const Weight& w, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y) {
  thread_local float sum[kLargestGradientM * kGradientLd];
  for (int64_t from = k0; from < k1; from += kGradientColumns) {
    const int64_t to = std::min(k1, from + kGradientColumns);
    std::memset(sum, 0, static_cast<size_t>(M * kGradientLd) * sizeof(float));
    int64_t n = 0;
    for (; n + 4 <= w.rows; n += 4) add_rows<BITS, 4>(w, n, from, to, grad, M, sum);
    for (; n < w.rows; n++) add_rows<BITS, 1>(w, n, from, to, grad, M, sum);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < to - from; k += kChunk) {
        const float* at = sum + m * kGradientLd + k;
        _mm512_mask_storeu_epi16(y + m * w.K + from + k, lanes(to - from - k), narrow(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)));
      }
  }
}

void gradient(const Weight& w, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y) {
  if (w.bits == 8) return gradient_of<8>(w, k0, k1, grad, M, y);
  if (w.bits == 6) return gradient_of<6>(w, k0, k1, grad, M, y);
  return gradient_of<12>(w, k0, k1, grad, M, y);
}

// ---- Products ----------------------------------------------------------------------------------------------------------------------------------

template <int BITS> void product(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
  if (M == 1) return few_rows<BITS, 1>(w, n0, n1, x, y, N);
  many_rows<BITS>(w, n0, n1, x, packed, M, y, N);
}

void linear(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
  if (w.bits == 8) return product<8>(w, n0, n1, x, packed, M, y, N);
  if (w.bits == 6) return product<6>(w, n0, n1, x, packed, M, y, N);
  return product<12>(w, n0, n1, x, packed, M, y, N);
}

}  // namespace

#define TEXT(name) #name
#define NAME(name) TEXT(name)
#ifdef __AMX_BF16__
const Kernels ISA = {NAME(ISA), decode, encode, linear, gradient, pack, 256, 2 * kTile};
#elif defined(__AVX512BF16__)
const Kernels ISA = {NAME(ISA), decode, encode, linear, gradient, nullptr, 32, kRows};
#else
const Kernels ISA = {NAME(ISA), decode, encode, linear, gradient, nullptr, 8, kRows};
#endif

}  // namespace arctic
