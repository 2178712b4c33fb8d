// Decoding and products for AVX-512, compiled once per instruction set: avx512, avx512_bf16 or amx.
//
// Numbers are converted to bfloat16 bits, 32 at a time, and dot products accumulate in float32. vdpbf16ps and the AMX unit treat subnormal inputs as zero,
// so no number may be one. A format has, beside what kernels.h asks for,
//   load(p, n = 32)   the first n codes at p in 16-bit lanes, whatever in the rest,
//   bf16(codes)       their numbers as bfloat16 bits,
//   floats(codes)     optional: the first 16 numbers and the last 16 in float32, if they differ from bf16(codes); decode() and gradient() use these,
//   scaled_table(scale), look_up(codes, table)   optional: bf16() times a scale, rounded, as the look-up in a vector that is made once for a group. AMX uses
//                     it, and so do products of few rows of formats with
//   kGroup            the size of all their groups: then no sums of single groups are kept, which would take longer than small groups.
#pragma once

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

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

inline __mmask64 first(int64_t bytes) { return bytes >= 64 ? ~0ull : (1ull << bytes) - 1; }

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

// bfloat16 bits times a scale, rounded.
inline __m512i scaled(__m512i values, __m512 scale) {
  return narrow(_mm512_mul_ps(widen(_mm512_castsi512_si256(values)), scale), _mm512_mul_ps(widen(_mm512_extracti64x4_epi64(values, 1)), scale));
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
template <typename F> inline int64_t whole(int64_t n) { return (n + F::unit - 1) / F::unit * F::unit; }

// The numbers of the codes in float32: the first 16, the last 16.
template <typename F> inline std::array<__m512, 2> floats(const auto& codes) {
  if constexpr (requires { F::floats(codes); }) {
    return F::floats(codes);
  } else {
    const __m512i value = F::bf16(codes);
    return {widen(_mm512_castsi512_si256(value)), widen(_mm512_extracti64x4_epi64(value, 1))};
  }
}

template <typename F> inline __m512 stepped(__m512 value) {
  if constexpr (kStep<F> == 1) return value;
  else return _mm512_mul_ps(value, _mm512_set1_ps(kStep<F>));
}

inline __mmask32 lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

template <typename F, Dtype D> void decode_as(const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, void* out, int64_t ld) {
  for (int64_t row = row0; row < row1; row++) {
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
      const __m512 scale = _mm512_set1_ps(w.scale[row * w.groups + group]);
      const uint8_t* codes = w.codes + row * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * F::bits / 8;
      for (; k < end; k += kChunk, codes += kChunk * F::bits / 8) {
        const int64_t n = std::min<int64_t>(kChunk, end - k);
        _mm_prefetch(reinterpret_cast<const char*>(codes) + 4 * w.row_bytes(), _MM_HINT_T0);  // four rows ahead
        const auto value = floats<F>(F::load(codes, whole<F>(n)));
        const __m512 low = stepped<F>(_mm512_mul_ps(value[0], scale)), high = stepped<F>(_mm512_mul_ps(value[1], scale));
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

// Write the sums of ROWS rows of the weight, in bfloat16.
template <int ROWS, int M> inline void finish(const __m512 (&total)[ROWS][M], int64_t n0, uint16_t* y, int64_t N) {
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

// The product with M rows of x, for ROWS rows of the weight at a time. Codes are looked up in registers, in a table that is scaled for each group.
template <typename F, int ROWS, int M> void few_scaled_rows(const Weight& w, int64_t n0, const uint16_t* x, uint16_t* y, int64_t N) {
  constexpr int kChains = M == 1 ? 2 : 1;  // independent sums, if there are too few rows of x to provide them
  static_assert(F::kGroup % (kChains * kChunk) == 0);
  __m512 sum[ROWS][M][kChains];
  for (auto& row : sum)
    for (auto& chains : row)
      for (auto& one : chains) one = _mm512_setzero_ps();
  const int64_t row_bytes = w.row_bytes();
  const uint8_t* codes = w.codes + n0 * row_bytes;
  const float* scale = w.scale + n0 * w.groups;
  const auto tables = [&](__m512i(&table)[ROWS]) {
    for (int row = 0; row < ROWS; row++) table[row] = F::scaled_table(_mm512_set1_ps(scale[row * w.groups]));
    scale++;
  };
  int64_t k = 0;
  for (; k + F::kGroup <= w.K; k += F::kGroup, codes += F::kGroup * F::bits / 8) {
    __m512i table[ROWS];
    tables(table);
    for (int row = 0; row < ROWS; row++) _mm_prefetch(reinterpret_cast<const char*>(codes) + (ROWS + row) * row_bytes, _MM_HINT_T0);  // the next rows
    for (int at = 0; at < F::kGroup; at += kChunk) {
      __m512i columns[M];
      for (int m = 0; m < M; m++) columns[m] = load(x + m * w.K + k + at);
      for (int row = 0; row < ROWS; row++) {
        const __m512i value = F::look_up(F::load(codes + row * row_bytes + at * F::bits / 8), table[row]);
        for (int m = 0; m < M; m++) sum[row][m][at / kChunk % kChains] = dot(sum[row][m][at / kChunk % kChains], value, columns[m]);
      }
    }
  }
  if (k < w.K) {
    __m512i table[ROWS];
    tables(table);
    for (; k < w.K; k += kChunk, codes += kChunk * F::bits / 8)
      for (int row = 0; row < ROWS; row++) {
        const __m512i value = F::look_up(F::load(codes + row * row_bytes), table[row]);
        for (int m = 0; m < M; m++) sum[row][m][0] = dot(sum[row][m][0], value, _mm512_maskz_loadu_epi16(lanes(w.K - k), x + m * w.K + k));
      }
  }
  __m512 total[ROWS][M];
  for (int row = 0; row < ROWS; row++)
    for (int m = 0; m < M; m++) total[row][m] = kChains == 2 ? _mm512_add_ps(sum[row][m][0], sum[row][m][kChains - 1]) : sum[row][m][0];
  finish(total, n0, y, N);
}

// The same for any format. Each scale multiplies its group's sum.
template <typename F, int ROWS, int M> void few_rows(const Weight& w, int64_t n0, const uint16_t* x, uint16_t* y, int64_t N) {
  if constexpr (requires { F::kGroup; }) return few_scaled_rows<F, ROWS, M>(w, n0, x, y, N);
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
        const uint8_t* at = codes + row * row_bytes + k * F::bits / 8;
        _mm_prefetch(reinterpret_cast<const char*>(at) + ROWS * row_bytes, _MM_HINT_T0);  // where the next rows will be read
        for (int chain = 0; chain < kChains; chain++) {
          const __m512i value = F::bf16(F::load(at + chain * kChunk * F::bits / 8));
          for (int m = 0; m < M; m++) sum[row][m][chain] = dot(sum[row][m][chain], value, columns[m][chain]);
        }
      }
    }
    for (; k < size; k += kChunk) {
      const int64_t n = std::min<int64_t>(kChunk, size - k), stored = std::min<int64_t>(kChunk, w.group - k);
      for (int row = 0; row < ROWS; row++) {
        const __m512i value = F::bf16(F::load(codes + row * row_bytes + k * F::bits / 8, stored));
        for (int m = 0; m < M; m++) sum[row][m][0] = dot(sum[row][m][0], value, _mm512_maskz_loadu_epi16(lanes(n), x + m * w.K + from + k));
      }
    }
    for (int row = 0; row < ROWS; row++) {
      const __m512 scale = _mm512_set1_ps(w.scale[(n0 + row) * w.groups + group] * kStep<F>);
      for (int m = 0; m < M; m++) {
        const __m512 all = kChains == 2 ? _mm512_add_ps(sum[row][m][0], sum[row][m][kChains - 1]) : sum[row][m][0];
        total[row][m] = _mm512_fmadd_ps(all, scale, total[row][m]);
      }
    }
  }
  finish(total, n0, y, N);
}

template <typename F, int M> void few_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, uint16_t* y, int64_t N) {
  // Short rows are read eight at a time, so that memory is read from several pages at once.
  if constexpr (M <= 2)
    if (w.row_bytes() < 4096)
      for (; n0 + 8 <= n1; n0 += 8) few_rows<F, 8, M>(w, n0, x, y, N);
  for (; n0 + 4 <= n1; n0 += 4) few_rows<F, 4, M>(w, n0, x, y, N);
  for (; n0 < n1; n0++) few_rows<F, 1, M>(w, n0, x, y, N);
}

#ifndef __AMX_BF16__

constexpr int kRows = 4, kColumns = 4;  // kRows * kColumns sums, kColumns vectors of x and the temporaries of decoding fit in 32 registers

// The product with any number of rows of x, four at a time; codes are read from memory only once.
template <typename F> void many_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t*, int64_t M, uint16_t* y, int64_t N) {
  for (; n0 < n1; n0 += kRows) {
    const int64_t end = std::min(n1, n0 + kRows);
    for (int64_t m = 0; m < M; m += kColumns) {
      const uint16_t* from = x + m * w.K;
      uint16_t* to = y + m * N;
      switch (M - m) {
        case 1: few_rows<F, 1>(w, n0, end, from, to, N); break;
        case 2: few_rows<F, 2>(w, n0, end, from, to, N); break;
        case 3: few_rows<F, 3>(w, n0, end, from, to, N); break;
        default: few_rows<F, kColumns>(w, n0, end, from, to, N); break;
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

// Decode rows [n0, n1), columns [k0, k1) to bfloat16, with zeros after K. The 32 columns from k are written to
// out[(n - n0) * row_stride + (k - k0) / 32 * chunk_stride].
// With one scale per row the values are left unscaled. Otherwise they are multiplied and rounded, as in decode(), and k0 is at the start of a group.
// `row` has room for one decoded row.
template <typename F>
void values(const Weight& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, uint16_t* out, int64_t row_stride, int64_t chunk_stride,
            uint16_t* row) {
  for (int64_t n = n0; n < n1; n++, out += row_stride) {
    uint16_t* to = out;
    const uint8_t* codes = w.codes + n * w.row_bytes() + k0 * F::bits / 8;  // groups follow each other without gaps
    if (w.groups > 1 && w.group % kChunk) {
      decode_as<F, Dtype::bf16>(w, n, n + 1, k0, std::min(k1, w.K), row, 0);
      for (int64_t k = k0; k < k1; k += kChunk, to += chunk_stride)
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(lanes(std::max<int64_t>(0, w.K - k)), row + k - k0));
      continue;
    }
    const float* scales = w.scale + n * w.groups;
    for (int64_t k = k0; k < k1;) {
      const int64_t group = w.groups > 1 ? k / w.group : 0, end = w.groups > 1 ? std::min(k1, (group + 1) * w.group) : k1;
      const __m512 scale = _mm512_set1_ps(w.groups > 1 ? scales[group] * kStep<F> : 1.0f);
      __m512i table;
      if constexpr (requires { F::scaled_table(scale); }) table = F::scaled_table(scale);  // costs less than multiplying a group
      for (; k < end; k += kChunk, codes += kChunk * F::bits / 8, to += chunk_stride) {
        const auto found = F::load(codes, std::clamp<int64_t>(w.groups * w.group - k, 0, kChunk));
        __m512i value;
        if constexpr (requires { F::scaled_table(scale); }) value = F::look_up(found, table);
        else value = w.groups > 1 ? scaled(F::bf16(found), scale) : F::bf16(found);
        _mm512_storeu_si512(to, value);
      }
    }
  }
}

template <typename F> float row_scale(const Weight& w, int64_t n) { return w.groups > 1 ? 1.0f : w.scale[n] * kStep<F>; }

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

template <typename F> void many_rows(const Weight& w, int64_t n0, int64_t n1, const uint16_t*, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
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
    for (int64_t i = 0; i < 2 * kTile; i++) scale[i] = i < rows ? row_scale<F>(w, n + i) : 0;
    for (int64_t k = 0; k < K; k += step) {
      const int64_t size = std::min(step, K - k);
      values<F>(w, n, n + low, k, k + size, decoded, kChunk, kTile * kChunk, row);
      if (rows > kTile) values<F>(w, n + kTile, n + rows, k, k + size, decoded + kTile * size, kChunk, kTile * kChunk, row);
      const bool last = k + step >= K;  // then other rows come next
      Prefetch prefetch(w.codes + (last ? n + 2 * kTile : n) * w.row_bytes() + (last ? 0 : (k + step) * F::bits / 8), w.row_bytes(), last ? n1 - n - 2 * kTile : rows, step * F::bits / 8);
      prefetch.left = std::min<int64_t>(prefetch.left, 2 * kTile);
      const int64_t lines = (2 * kTile * step * F::bits / 8 / 64) / (pairs * size / kChunk) + 1;
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
template <typename F, int M, int ROWS>
void add_rows(const uint8_t* codes, int64_t row_bytes, int64_t size, const float (*factor)[4], float* sum) {
  __m512 by[M][ROWS];
  for (int m = 0; m < M; m++)
    for (int row = 0; row < ROWS; row++) by[m][row] = _mm512_set1_ps(factor[m][row]);
  for (int64_t k = 0; k < size; k += kChunk) {
    const int64_t n = std::min<int64_t>(kChunk, whole<F>(size - k));
    __m512 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = _mm512_loadu_ps(sum + m * kGradientLd + k), high[m] = _mm512_loadu_ps(sum + m * kGradientLd + k + 16);
    for (int row = 0; row < ROWS; row++) {
      const uint8_t* at = codes + row * row_bytes + k * F::bits / 8;
      _mm_prefetch(reinterpret_cast<const char*>(at) + ROWS * row_bytes, _MM_HINT_T0);
      const auto [first_half, second_half] = floats<F>(F::load(at, n));
      for (int m = 0; m < M; m++) {
        low[m] = _mm512_fmadd_ps(first_half, by[m][row], low[m]);
        high[m] = _mm512_fmadd_ps(second_half, by[m][row], high[m]);
      }
    }
    for (int m = 0; m < M; m++) _mm512_storeu_ps(sum + m * kGradientLd + k, low[m]), _mm512_storeu_ps(sum + m * kGradientLd + k + 16, high[m]);
  }
}

// The same for any number of rows of grad, four at a time.
template <typename F, int ROWS>
void add_rows(const Weight& w, int64_t n, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, float* sum) {
  for (int64_t k = k0; k < k1;) {
    const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
    const uint8_t* codes = w.codes + n * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * F::bits / 8;
    for (int64_t m = 0; m < M; m += 4) {
      float factor[4][4];
      for (int64_t i = 0; i < std::min<int64_t>(4, M - m); i++)
        for (int row = 0; row < ROWS; row++) {
          const uint32_t bits = static_cast<uint32_t>(grad[(m + i) * w.rows + n + row]) << 16;
          std::memcpy(&factor[i][row], &bits, 4);
          factor[i][row] *= w.scale[(n + row) * w.groups + group] * kStep<F>;
        }
      float* to = sum + m * kGradientLd + k - k0;
      switch (M - m) {
        case 1: add_rows<F, 1, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        case 2: add_rows<F, 2, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        case 3: add_rows<F, 3, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
        default: add_rows<F, 4, ROWS>(codes, w.row_bytes(), end - k, factor, to); break;
      }
    }
    k = end;
  }
}

template <typename F> void gradient_of(const Weight& w, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y) {
  thread_local float sum[kLargestGradientM * kGradientLd];
  for (int64_t from = k0; from < k1; from += kGradientColumns) {
    const int64_t to = std::min(k1, from + kGradientColumns);
    std::memset(sum, 0, static_cast<size_t>(M * kGradientLd) * sizeof(float));
    int64_t n = 0;
    for (; n + 4 <= w.rows; n += 4) add_rows<F, 4>(w, n, from, to, grad, M, sum);
    for (; n < w.rows; n++) add_rows<F, 1>(w, n, from, to, grad, M, sum);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < to - from; k += kChunk) {
        const float* at = sum + m * kGradientLd + k;
        _mm512_mask_storeu_epi16(y + m * w.K + from + k, lanes(to - from - k), narrow(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)));
      }
  }
}

// ---- Products ----------------------------------------------------------------------------------------------------------------------------------

template <typename F> void product(const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
  if (M == 1) return few_rows<F, 1>(w, n0, n1, x, y, N);
  many_rows<F>(w, n0, n1, x, packed, M, y, N);
}

// The table of a library: `All` are its Formats.
template <typename All> constexpr Kernels products(const char* name) {
  return {
      .name = name,
      .decode = [](const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
        All::with(w.format, [&]<typename F>() { with_dtype(dtype, [&]<Dtype D>() { decode_as<F, D>(w, r0, r1, k0, k1, out, ld); }); });
      },
      .linear = [](const Weight& w, int64_t n0, int64_t n1, const uint16_t* x, const uint16_t* packed, int64_t M, uint16_t* y, int64_t N) {
        All::with(w.format, [&]<typename F>() { product<F>(w, n0, n1, x, packed, M, y, N); });
      },
      .gradient = [](const Weight& w, int64_t k0, int64_t k1, const uint16_t* grad, int64_t M, uint16_t* y) {
        All::with(w.format, [&]<typename F>() { gradient_of<F>(w, k0, k1, grad, M, y); });
      },
#ifdef __AMX_BF16__
      .pack = pack,
      .largest_m = 256,
      .rows = 2 * kTile,
#else
      .pack = nullptr,
#ifdef __AVX512BF16__
      .largest_m = 32,
#else
      .largest_m = 8,
#endif
      .rows = kRows,
#endif
  };
}

}  // namespace
}  // namespace arctic
