// Decoding and products in float32 for every processor. Compiled once for AVX2 (avx2) and once for any processor (portable), see vectors.h.
//
// A format has, beside what kernels.h asks for,
//   kUnit        a power of two by which its numbers are divided,
//   values(p)    the numbers of the kChunk codes at p, divided by kUnit. It reads kRead bytes, 32 at most;
//   kDotRows     the number of rows of x up to which products sum along K instead of decoding panels. Codes are then decoded for every four rows,
//   dot_values(p), kDotChunk, kDotUnit   optional, a faster way for products of few rows: the numbers of the kDotChunk codes at p, divided by kDotUnit. Lane
//                l of vector i is number l * vectors + i; x is brought into the same order,
//   kGroup, scaled_table(scale), look_up(p, i, table)   optional, where all groups are of kGroup = kDotChunk codes: vector i of dot_values() times the scale,
//                from a table that is made once for a group. Then no sums of single groups are kept, which would take longer than small groups,
//   halves(p), widened(half)   optional, for AVX2: values() in 16-bit lanes, and how eight of these become floats.
#pragma once

#include "vectors.h"

#include <cstdlib>
#include <memory>

namespace arctic {
namespace {

// This thread's own memory for `count` floats, kept between calls.
float* buffer(int64_t count) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((count * 4 + 63) / 64 * 64))));
    size = count;
  }
  return memory.get();
}

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

template <typename F> constexpr float kDotUnit = [] {
  if constexpr (requires { F::kDotUnit; }) return F::kDotUnit;
  else return F::kUnit;
}();
template <typename F> constexpr int kDotChunk = [] {
  if constexpr (requires { F::kDotChunk; }) return F::kDotChunk;
  else return kChunk;
}();
template <typename F> inline std::array<Floats, kDotChunk<F> / kLanes> dot_values(const uint8_t* p) {
  if constexpr (requires { F::dot_values(p); }) return F::dot_values(p);
  else return F::values(p);
}

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

inline const uint8_t* end_of(const Weight& w) { return w.codes + w.rows * w.row_bytes(); }

// A pointer that values() can safely read from in place of p: p, or a copy near the end of the codes.
template <typename F> inline const uint8_t* readable(const uint8_t* p, const uint8_t* end, uint8_t (&copy)[32]) {
  if (end - p >= F::kRead) return p;
  std::memset(copy, 0, sizeof copy);
  if (end > p) std::memcpy(copy, p, static_cast<size_t>(end - p));
  return copy;
}

template <typename F> inline const uint8_t* codes_at(const Weight& w, int64_t row, int64_t group, int64_t k) {
  return w.codes + row * w.row_bytes() + group * w.group_bytes() + (k - group * w.group) * F::bits / 8;
}

template <typename F> inline Floats stepped(Floats value) {
  if constexpr (kStep<F> == 1) return value;
  else return value * kStep<F>;
}

template <typename F, Dtype D> void decode_as(const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, void* out, int64_t ld) {
  const uint8_t* stop = end_of(w);
  uint8_t copy[32];
  for (int64_t row = row0; row < row1; row++) {
    char* to = static_cast<char*>(out) + (row - row0) * ld * kSize<D>;
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
      const float scale = w.scale[row * w.groups + group] * F::kUnit;
      const uint8_t* codes = codes_at<F>(w, row, group, k);
      for (; k + kChunk <= end; k += kChunk, codes += kChunk * F::bits / 8, to += kChunk * kSize<D>) {
        __builtin_prefetch(codes + 2 * w.row_bytes());
        const Chunk value = F::values(readable<F>(codes, stop, copy));
        for (int i = 0; i < kVectors; i++) store_as<D>(to + i * kLanes * kSize<D>, stepped<F>(value[i] * scale));
      }
      if (k < end) {
        const Chunk value = F::values(readable<F>(codes, stop, copy));
        char last[kChunk * 4];
        for (int i = 0; i < kVectors; i++) store_as<D>(last + i * kLanes * kSize<D>, stepped<F>(value[i] * scale));
        std::memcpy(to, last, static_cast<size_t>((end - k) * kSize<D>));
        to += (end - k) * kSize<D>;
        k = end;
      }
    }
  }
}

// ---- Products of up to kDotRows rows: codes are decoded in registers, each scale multiplies its group's sum --------------------------------------

inline int64_t padded(int64_t size) { return (size + kChunk - 1) / kChunk * kChunk; }

// Whether dots() takes rows of x in the order of dot_values(); whether centre() scaled them, and the factor that undoes the other half of that scaling.
template <typename F> constexpr bool kReordered = requires { F::kDotChunk; };
template <typename F> constexpr bool kCentred = kDotUnit<F> != F::kUnit;
template <typename F> constexpr float kDotFactor = (kCentred<F> ? kDotUnit<F> * 0x1p-60f : kDotUnit<F>)*kStep<F>;

// The product with M rows of x for ROWS rows of the weight, whose numbers are looked up in tables that are scaled for each group.
template <typename F, int ROWS, int M> void scaled_dots(const Weight& w, int64_t n0, const float* x, Dtype dtype, void* y, int64_t N) {
  static_assert(F::kGroup == kDotChunk<F> && kDotUnit<F> == 1 && kStep<F> == 1);
  constexpr int kChains = M == 1 ? 2 : 1;  // independent sums, if there are too few rows of x to provide them
  const int64_t ld = padded(w.K), row_bytes = w.row_bytes();
  const uint8_t* codes = w.codes + n0 * row_bytes;
  const float* scale = w.scale + n0 * w.groups;
  Floats sum[ROWS][M][kChains] = {};
  int64_t k = 0;
  for (; k + F::kGroup <= w.K; k += F::kGroup, codes += F::kGroup * F::bits / 8, scale++) {
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
      const uint8_t* here = codes + row * row_bytes;
      __builtin_prefetch(here + ROWS * row_bytes);  // where the next rows will be read
      const auto table = F::scaled_table(scale[row * w.groups]);
#pragma GCC unroll 16
      for (int i = 0; i < F::kGroup / kLanes; i++) {
        const Floats value = F::look_up(here, i, table);
        for (int m = 0; m < M; m++) sum[row][m][i % kChains] += value * load<Floats>(x + m * ld + k + i * kLanes);
      }
    }
  }
  for (; k < w.K; k += kChunk, codes += kChunk * F::bits / 8)  // the last group is stored whole
    for (int row = 0; row < ROWS; row++) {
      const Chunk value = F::values(codes + row * row_bytes);
      const int64_t size = std::min<int64_t>(kChunk, w.K - k);
      for (int m = 0; m < M; m++) {
        float columns[kChunk] = {};  // columns after the last count as zero
        std::memcpy(columns, x + m * ld + k, static_cast<size_t>(size) * 4);
        for (int i = 0; i < kVectors; i++) sum[row][m][i % kChains] += value[i] * scale[row * w.groups] * load<Floats>(columns + i * kLanes);
      }
    }
  for (int m = 0; m < M; m++) {
    float result[ROWS];
    for (int row = 0; row < ROWS; row++) result[row] = sum_of(kChains == 2 ? sum[row][m][0] + sum[row][m][kChains - 1] : sum[row][m][0]);
    narrow(dtype, result, ROWS, at(y, dtype, m * N + n0));
  }
}

// The same for any format. Each scale multiplies its group's sum.
// x [M, ld] is the original input, and after[m] is 1; or x is the result of centre(), and after[m] is 2^(60 - p).
template <typename F, int ROWS, int M>
void plain_dots(const Weight& w, int64_t n0, const float* x, const float* after, Dtype dtype, void* y, int64_t N) {
  constexpr int kChains = M == 1 ? 2 : 1;  // independent sums, if there are too few rows of x to provide them
  constexpr int64_t kBlock = kDotChunk<F>;
  const int64_t ld = padded(w.K), row_bytes = w.row_bytes();
  const uint8_t* stop = end_of(w);
  const bool alone = w.groups == 1;  // then the scale is applied last; otherwise the parts of very small sums would be rounded one by one
  Floats total[ROWS][M] = {};
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t from = group * w.group, size = std::min(w.group, w.K - from);
    const uint8_t* codes = w.codes + n0 * row_bytes + group * w.group_bytes();
    const int64_t sure = std::min(size, (stop - codes - (ROWS - 1) * row_bytes - F::kRead) * 8 / F::bits + kChunk);
    Floats sum[ROWS][M][kChains] = {};
    int64_t k = 0;
    for (; k + kBlock <= sure; k += kBlock) {
      for (int row = 0; row < ROWS; row++) {
        const uint8_t* here = codes + row * row_bytes + k * F::bits / 8;
        __builtin_prefetch(here + ROWS * row_bytes);  // where the next rows will be read
        const auto value = dot_values<F>(here);
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kBlock / kLanes; i++) sum[row][m][i % kChains] += value[i] * load<Floats>(x + m * ld + from + k + i * kLanes);
      }
    }
    constexpr float factor = F::kUnit / kDotUnit<F>;
    for (; k < size; k += kChunk) {
      float columns[M][kChunk] = {};  // columns after the group count as zero
      for (int m = 0; m < M; m++) std::memcpy(columns[m], x + m * ld + from + k, static_cast<size_t>(std::min<int64_t>(kChunk, size - k)) * 4);
      for (int row = 0; row < ROWS; row++) {
        uint8_t copy[32];
        const Chunk value = F::values(readable<F>(codes + row * row_bytes + k * F::bits / 8, stop, copy));
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kVectors; i++) sum[row][m][i % kChains] += value[i] * factor * load<Floats>(columns[m] + i * kLanes);
      }
    }
    for (int row = 0; row < ROWS; row++) {
      const float scale = w.scale[(n0 + row) * w.groups + group];
      for (int m = 0; m < M; m++) {
        Floats both = sum[row][m][0];
        if constexpr (kChains == 2) both += sum[row][m][1];
        total[row][m] += alone ? both : both * kDotFactor<F> * scale;
      }
    }
  }
  for (int m = 0; m < M; m++) {
    float result[ROWS];
    for (int row = 0; row < ROWS; row++) {
      const float sum = sum_of(total[row][m]);
      result[row] = (alone ? sum * kDotFactor<F> * w.scale[n0 + row] : sum) * after[m];
    }
    narrow(dtype, result, ROWS, at(y, dtype, m * N + n0));
  }
}

// Write the row x[K] with whole blocks of a group in the order of dot_values(); if kCentred, scaled so that its largest magnitude is near 2^60 (unscaled if
// that is not finite). Returns the factor that undoes the scaling together with kDotFactor.
template <typename F> float centre(const Weight& w, const float* x, float* to) {
  constexpr int64_t kBlock = kDotChunk<F>;
  const int64_t size = w.K;
  int32_t largest = 0;
  for (int64_t k = 0; kCentred<F> && k < size; k++) largest = std::max(largest, std::bit_cast<int32_t>(x[k]) & 0x7FFFFFFF);
  const int exponent = (largest >> 23) - 127;
  const int power = largest == 0 || exponent == 128 ? 0 : std::min(60 - exponent, 127);
  const float factor = std::bit_cast<float>((power + 127) << 23);
  for (int64_t from = 0; from < size; from += w.group) {
    const int64_t end = std::min(size, from + w.group);
    int64_t k = from;
    for (; k + kBlock <= end; k += kBlock)
      for (int64_t i = 0; i < kBlock; i++) to[k + i] = x[k + i % kLanes * (kBlock / kLanes) + i / kLanes] * factor;
    for (; k < end; k++) to[k] = x[k] * factor;
  }
  return kCentred<F> ? std::bit_cast<float>((60 - power + 127) << 23) : 1;
}

template <typename F, int M> void dots(const Weight& w, int64_t n0, int64_t n1, const float* x, const float* after, Dtype dtype, void* y, int64_t N) {
  constexpr int kRows = M < 4 ? 4 : 2;  // so that the sums fit in registers
  const auto dots = [&]<int ROWS>() {
    if constexpr (requires { F::kGroup; }) scaled_dots<F, ROWS, M>(w, n0, x, dtype, y, N);
    else plain_dots<F, ROWS, M>(w, n0, x, after, dtype, y, N);
  };
  for (; n0 + kRows <= n1; n0 += kRows) dots.template operator()<kRows>();
  for (; n0 < n1; n0++) dots.template operator()<1>();
}

// The product with M rows of x, which pass over a few rows of the weight in groups that are as even as possible.
template <typename F> void few(const Weight& w, int64_t n0, int64_t n1, const float* x, int64_t M, Dtype dtype, void* y, int64_t N) {
  const int64_t ld = padded(w.K), groups = (M + 3) / 4, size = (M + groups - 1) / groups;
  float after[F::kDotRows];
  std::fill(after, after + M, 1.0f);
  if constexpr (kReordered<F>) {
    float* centred = buffer(M * ld);
    for (int64_t m = 0; m < M; m++) after[m] = centre<F>(w, x + m * ld, centred + m * ld);
    x = centred;
  }
  for (; n0 < n1; n0 += 4) {
    const int64_t end = std::min(n0 + 4, n1);
    for (int64_t m = 0; m < M; m += size) {
      const float* rows = x + m * ld;
      void* to = at(y, dtype, m * N);
      switch (std::min(size, M - m)) {
        case 1: dots<F, 1>(w, n0, end, rows, after + m, dtype, to, N); break;
        case 2: dots<F, 2>(w, n0, end, rows, after + m, dtype, to, N); break;
        case 3: dots<F, 3>(w, n0, end, rows, after + m, dtype, to, N); break;
        default: dots<F, 4>(w, n0, end, rows, after + m, dtype, to, N); break;
      }
    }
  }
}

// ---- Products of more rows: the weight is decoded in panels of kWidth columns, which stay in the first-level cache --------------------------------

constexpr int64_t kDepth = 256;  // rows of a panel

// sums[M][kWidth] += x[size][M] times panel[size][ld].
template <int M> inline void multiply(const float* x, const float* panel, int64_t size, int64_t ld, float* sums) {
  Floats sum[M][2];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < 2; i++) sum[m][i] = load<Floats>(sums + m * kWidth + i * kLanes);
  for (int64_t k = 0; k < size; k++, x += M, panel += ld) {
    const Floats first = load<Floats>(panel), second = load<Floats>(panel + kLanes);
    for (int m = 0; m < M; m++) {
      sum[m][0] += first * x[m];
      sum[m][1] += second * x[m];
    }
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < 2; i++) store(sums + m * kWidth + i * kLanes, sum[m][i]);
}

// The same for M rows of the result of pack() for [M, whole], starting at k.
void multiply(const float* packed, int64_t M, int64_t whole, int64_t k, const float* panel, int64_t size, int64_t ld, float* sums) {
  const int64_t block = even_block(M);
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = std::min(block, M - m);
    const float* x = packed + m * padded(whole) + k * rows;
    float* to = sums + m * kWidth;
    switch (rows) {
      case 1: multiply<1>(x, panel, size, ld, to); break;
      case 2: multiply<2>(x, panel, size, ld, to); break;
      case 3: multiply<3>(x, panel, size, ld, to); break;
      case 4: multiply<4>(x, panel, size, ld, to); break;
      case 5: multiply<5>(x, panel, size, ld, to); break;
      default: multiply<6>(x, panel, size, ld, to); break;
    }
  }
}

// Decode columns [k, k + n), n at most 16, of kLanes rows to panel[n][kWidth].
template <typename F> inline void decode_across(const uint8_t* const (&rows)[kLanes], const float* scale, int64_t n, float* panel) {
#ifdef __AVX2__
  const Floats by = load<Floats>(scale);
  if constexpr (requires { F::halves(rows[0]); }) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = F::halves(rows[i]);
    for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; j++)
        a[i + 2 * j] = _mm256_unpacklo_epi32(b[i + j], b[i + j + 2]), a[i + 2 * j + 1] = _mm256_unpackhi_epi32(b[i + j], b[i + j + 2]);
    for (int j = 0; j < 4; j++) b[2 * j] = _mm256_unpacklo_epi64(a[j], a[j + 4]), b[2 * j + 1] = _mm256_unpackhi_epi64(a[j], a[j + 4]);
    // b[j]: columns j and 8 + j
    if (n == kChunk) {
      for (int j = 0; j < 8; j++) {
        store(panel + j * kWidth, F::widened(_mm256_castsi256_si128(b[j])) * by);
        store(panel + (8 + j) * kWidth, F::widened(_mm256_extracti128_si256(b[j], 1)) * by);
      }
    } else {
      for (int64_t j = 0; j < n; j++)
        store(panel + j * kWidth, F::widened(j < 8 ? _mm256_castsi256_si128(b[j]) : _mm256_extracti128_si256(b[j - 8], 1)) * by);
    }
  } else {
    Chunk decoded[8];
    for (int i = 0; i < 8; i++) decoded[i] = F::values(rows[i]);
    for (int half = 0; half < kVectors; half++) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(decoded[i][half], decoded[i + 1][half]);
        a[i + 1] = _mm256_unpackhi_ps(decoded[i][half], decoded[i + 1][half]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
          const __m256d low = _mm256_castps_pd(a[i + j]), high = _mm256_castps_pd(a[i + j + 2]);
          b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
          b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
      for (int64_t j = 0; j < std::min<int64_t>(8, n - half * 8); j++) {
        const Floats column = j < 4 ? _mm256_permute2f128_ps(b[j], b[j + 4], 0x20) : _mm256_permute2f128_ps(b[j - 4], b[j], 0x31);
        store(panel + (half * 8 + j) * kWidth, column * by);
      }
    }
  }
#else
  float decoded[kLanes][kChunk];
  for (int row = 0; row < kLanes; row++) {
    const Chunk value = F::values(rows[row]);
    for (int i = 0; i < kVectors; i++) store(decoded[row] + i * kLanes, value[i] * scale[row]);
  }
  for (int64_t j = 0; j < n; j++)
    for (int row = 0; row < kLanes; row++) panel[j * kWidth + row] = decoded[row][j];
#endif
}

// Decode columns [k0, k1) of rows [n, n + kWidth) to panel[k1 - k0][kWidth]. Rows past the end repeat the last one.
template <typename F> void fill(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* panel) {
  const uint8_t* stop = end_of(w);
  for (int64_t k = k0; k < k1;) {
    const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
    for (int64_t part = 0; part < kWidth; part += kLanes) {
      const uint8_t* first[kLanes];
      alignas(32) float scale[kLanes];
      for (int64_t i = 0; i < kLanes; i++) {
        const int64_t row = std::min(n + part + i, w.rows - 1);
        first[i] = codes_at<F>(w, row, group, k);
        scale[i] = w.scale[row * w.groups + group] * F::kUnit * kStep<F>;
      }
      const bool near_end = (w.rows - n - kWidth) * w.row_bytes() < F::kRead;  // bytes after the panel: near the end a copy may be needed
      for (int64_t from = k; from < end; from += kChunk) {
        const uint8_t* rows[kLanes];
        uint8_t copies[kLanes][32];
        for (int64_t i = 0; i < kLanes; i++) {
          rows[i] = first[i] + (from - k) * F::bits / 8;
          if (near_end) rows[i] = readable<F>(rows[i], stop, copies[i]);
          else __builtin_prefetch(rows[i] + kWidth * w.row_bytes());
        }
        decode_across<F>(rows, scale, std::min<int64_t>(kChunk, end - from), panel + (from - k0) * kWidth + part);
      }
    }
    k = end;
  }
}

// Write sums[M][kWidth] to y[m, n], n within `width`.
inline void finish(const float* sums, int64_t M, int64_t width, Dtype dtype, void* y, int64_t N) {
  for (int64_t m = 0; m < M; m++) narrow(dtype, sums + m * kWidth, width, at(y, dtype, m * N));
}

template <typename F> void panels(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  float *panel = buffer(kDepth * kWidth + M * kWidth), *sums = panel + kDepth * kWidth;
  for (int64_t n = n0; n < n1; n += kWidth) {
    std::fill(sums, sums + M * kWidth, 0.0f);
    for (int64_t k = 0; k < w.K; k += kDepth) {
      const int64_t end = std::min(w.K, k + kDepth);
      fill<F>(w, n, k, end, panel);
      multiply(packed, M, w.K, k, panel, end - k, kWidth, sums);
    }
    finish(sums, M, std::min<int64_t>(kWidth, n1 - n), dtype, at(y, dtype, n), N);
  }
}

template <typename F> void product(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  if (M <= F::kDotRows) return few<F>(w, n0, n1, packed, M, dtype, y, N);
  panels<F>(w, n0, n1, packed, M, dtype, y, N);
}

// For gradients, decoded rows already lie along a panel's columns. This many are decoded at a time, padded so that they are spread over the cache.
constexpr int64_t kAcross = 64, kAcrossLd = kAcross + kWidth;

template <typename F> void gradient_of(const Weight& w, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype dtype, void* y) {
  constexpr int64_t depth = kDepth / 2;
  float *panel = buffer(depth * kAcrossLd + M * kAcross), *sums = panel + depth * kAcrossLd;
  for (int64_t k = k0; k < k1; k += kAcross) {
    const int64_t end = std::min(k1, k + kAcross);
    std::fill(sums, sums + M * kAcross, 0.0f);
    for (int64_t n = 0; n < w.rows; n += depth) {
      const int64_t rows = std::min(depth, w.rows - n);
      decode_as<F, Dtype::f32>(w, n, n + rows, k, end, panel, kAcrossLd);
      for (int64_t part = 0; part < end - k; part += kWidth) multiply(packed, M, w.rows, n, panel + part, rows, kAcrossLd, sums + part * M);
    }
    for (int64_t part = 0; part < end - k; part += kWidth)
      finish(sums + part * M, M, std::min<int64_t>(kWidth, end - k - part), dtype, at(y, dtype, k + part), w.K);
  }
}

// packed[block][size][rows of the block].
void pack(Dtype dtype, const void* x, int64_t M, int64_t size, int64_t block, int64_t from, int64_t to, float* packed) {
  for (int64_t m = from * block; m < std::min(M, to * block); m += block) {
    const int64_t rows = std::min(block, M - m);
    float* to = packed + m * padded(size);
    if (rows == 1) {
      widen(dtype, at(x, dtype, m * size), size, to);
      continue;
    }
    float* row = buffer(size);
    for (int64_t i = 0; i < rows; i++) {
      widen(dtype, at(x, dtype, (m + i) * size), size, row);
      for (int64_t k = 0; k < size; k++) to[k * rows + i] = row[k];
    }
  }
}

// The table of a library: `All` are its Formats.
template <typename All> constexpr Kernels products(const char* name) {
  return {
      .name = name,
      .decode = [](const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
        All::with(w.format, [&]<typename F>() { with_dtype(dtype, [&]<Dtype D>() { decode_as<F, D>(w, r0, r1, k0, k1, out, ld); }); });
      },
      .linear = nullptr,
      .gradient = nullptr,
      .pack = nullptr,
#ifdef __AVX2__
      .largest_m = 256,
#else
      .largest_m = 16,
#endif
      .rows = kChunk,
      .pack_floats = pack,
      .linear_block = [](const Weight& w, int64_t M) {
        int64_t block = even_block(M);
        All::with(w.format, [&]<typename F>() { if (M <= F::kDotRows) block = 1; });
        return block;
      },
      .linear_floats = [](const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
        All::with(w.format, [&]<typename F>() { product<F>(w, n0, n1, packed, M, dtype, y, N); });
      },
      .gradient_floats = [](const Weight& w, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype dtype, void* y) {
        All::with(w.format, [&]<typename F>() { gradient_of<F>(w, k0, k1, packed, M, dtype, y); });
      },
      .widen = widen,
      .narrow = narrow,
  };
}

}  // namespace
}  // namespace arctic
