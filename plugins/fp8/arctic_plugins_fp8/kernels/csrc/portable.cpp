// Kernels for every processor, with products in float32. Compiled with -DISA=avx2 and with -DISA=portable, see vectors.h.

#include "vectors.h"

#include <cstdlib>
#include <limits>
#include <memory>

namespace arctic {
namespace {

// ---- Encoding ----------------------------------------------------------------------------------------------------------------------------------

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

// ---- Products of up to dot_rows() rows: codes are decoded in registers, each scale multiplies its group's sum --------------------------------------

inline int64_t padded(int64_t size) { return (size + kChunk - 1) / kChunk * kChunk; }

// Whether dots() takes rows of x that centre() scaled, and the factor that undoes the other half of that scaling.
template <int BITS> constexpr bool kCentred = kDotUnit<BITS> != kUnit<BITS>;
template <int BITS> constexpr float kDotFactor = kCentred<BITS> ? kDotUnit<BITS> * 0x1p-60f : kDotUnit<BITS>;

// x [M, ld] is the original input, and after[m] is 1; or x is the result of centre(), and after[m] is 2^(60 - p).
template <int BITS, int ROWS, int M>
void dots(const Weight& w, int64_t n0, const float* x, const float* after, Dtype dtype, void* y, int64_t N) {
  constexpr int kChains = M == 1 ? 2 : 1;  // independent sums, if there are too few rows of x to provide them
  constexpr int64_t kBlock = kDotChunk<BITS>;
  const int64_t ld = padded(w.K), row_bytes = w.row_bytes();
  const uint8_t* stop = end_of(w);
  const bool alone = w.groups == 1;  // then the scale is applied last; otherwise the parts of very small sums would be rounded one by one
  Floats total[ROWS][M] = {};
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t from = group * w.group, size = std::min(w.group, w.K - from);
    const uint8_t* codes = w.codes + n0 * row_bytes + group * w.group_bytes();
    const int64_t sure = std::min(size, (stop - codes - (ROWS - 1) * row_bytes - kRead<BITS>) * 8 / BITS + kChunk);
    Floats sum[ROWS][M][kChains] = {};
    int64_t k = 0;
    for (; k + kBlock <= sure; k += kBlock) {
      for (int row = 0; row < ROWS; row++) {
        const uint8_t* here = codes + row * row_bytes + k * BITS / 8;
        __builtin_prefetch(here + ROWS * row_bytes);  // where the next rows will be read
        const auto value = dot_values<BITS>(here);
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kBlock / kLanes; i++) sum[row][m][i % kChains] += value[i] * load<Floats>(x + m * ld + from + k + i * kLanes);
      }
    }
    constexpr float factor = kUnit<BITS> / kDotUnit<BITS>;
    for (; k < size; k += kChunk) {
      float columns[M][kChunk] = {};  // columns after the group count as zero
      for (int m = 0; m < M; m++) std::memcpy(columns[m], x + m * ld + from + k, static_cast<size_t>(std::min<int64_t>(kChunk, size - k)) * 4);
      for (int row = 0; row < ROWS; row++) {
        uint8_t copy[32];
        const Chunk value = values<BITS>(readable<BITS>(codes + row * row_bytes + k * BITS / 8, stop, copy));
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kVectors; i++) sum[row][m][i % kChains] += value[i] * factor * load<Floats>(columns[m] + i * kLanes);
      }
    }
    for (int row = 0; row < ROWS; row++) {
      const float scale = w.scale[(n0 + row) * w.groups + group];
      for (int m = 0; m < M; m++) {
        Floats both = sum[row][m][0];
        if constexpr (kChains == 2) both += sum[row][m][1];
        total[row][m] += alone ? both : both * kDotFactor<BITS> * scale;
      }
    }
  }
  for (int m = 0; m < M; m++) {
    float result[ROWS];
    for (int row = 0; row < ROWS; row++) {
      const float sum = sum_of(total[row][m]);
      result[row] = (alone ? sum * kDotFactor<BITS> * w.scale[n0 + row] : sum) * after[m];
    }
    narrow(dtype, result, ROWS, at(y, dtype, m * N + n0));
  }
}

// Write the row x[K] scaled so that its largest magnitude is near 2^60 (unscaled if that is not finite), with whole blocks of a group in the order of
// dot_values(). Returns the factor that undoes the scaling together with kDotFactor.
template <int BITS> float centre(const Weight& w, const float* x, float* to) {
  constexpr int64_t kBlock = kDotChunk<BITS>;
  const int64_t size = w.K;
  int32_t largest = 0;
  for (int64_t k = 0; k < size; k++) largest = std::max(largest, std::bit_cast<int32_t>(x[k]) & 0x7FFFFFFF);
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
  return std::bit_cast<float>((60 - power + 127) << 23);
}

template <int BITS, int M> void dots(const Weight& w, int64_t n0, int64_t n1, const float* x, const float* after, Dtype dtype, void* y, int64_t N) {
  constexpr int kRows = M < 4 ? 4 : 2;  // so that the sums fit in registers
  for (; n0 + kRows <= n1; n0 += kRows) dots<BITS, kRows, M>(w, n0, x, after, dtype, y, N);
  for (; n0 < n1; n0++) dots<BITS, 1, M>(w, n0, x, after, dtype, y, N);
}

// The product with M rows of x, which pass over a few rows of the weight in groups that are as even as possible.
template <int BITS> void few(const Weight& w, int64_t n0, int64_t n1, const float* x, int64_t M, Dtype dtype, void* y, int64_t N) {
  const int64_t ld = padded(w.K), groups = (M + 3) / 4, size = (M + groups - 1) / groups;
  float after[dot_rows(BITS)];
  std::fill(after, after + M, 1.0f);
  if constexpr (kCentred<BITS>) {
    float* centred = buffer(M * ld);
    for (int64_t m = 0; m < M; m++) after[m] = centre<BITS>(w, x + m * ld, centred + m * ld);
    x = centred;
  }
  for (; n0 < n1; n0 += 4) {
    const int64_t end = std::min(n0 + 4, n1);
    for (int64_t m = 0; m < M; m += size) {
      const float* rows = x + m * ld;
      void* to = at(y, dtype, m * N);
      switch (std::min(size, M - m)) {
        case 1: dots<BITS, 1>(w, n0, end, rows, after + m, dtype, to, N); break;
        case 2: dots<BITS, 2>(w, n0, end, rows, after + m, dtype, to, N); break;
        case 3: dots<BITS, 3>(w, n0, end, rows, after + m, dtype, to, N); break;
        default: dots<BITS, 4>(w, n0, end, rows, after + m, dtype, to, N); break;
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
template <int BITS> inline void decode_across(const uint8_t* const (&rows)[kLanes], const float* scale, int64_t n, float* panel) {
#ifdef __AVX2__
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = halves<BITS>(rows[i]);
  for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++)
      a[i + 2 * j] = _mm256_unpacklo_epi32(b[i + j], b[i + j + 2]), a[i + 2 * j + 1] = _mm256_unpackhi_epi32(b[i + j], b[i + j + 2]);
  for (int j = 0; j < 4; j++) b[2 * j] = _mm256_unpacklo_epi64(a[j], a[j + 4]), b[2 * j + 1] = _mm256_unpackhi_epi64(a[j], a[j + 4]);
  const Floats by = load<Floats>(scale);  // b[j]: columns j and 8 + j
  if (n == kChunk) {
    for (int j = 0; j < 8; j++) {
      store(panel + j * kWidth, widened<BITS>(_mm256_castsi256_si128(b[j])) * by);
      store(panel + (8 + j) * kWidth, widened<BITS>(_mm256_extracti128_si256(b[j], 1)) * by);
    }
  } else {
    for (int64_t j = 0; j < n; j++)
      store(panel + j * kWidth, widened<BITS>(j < 8 ? _mm256_castsi256_si128(b[j]) : _mm256_extracti128_si256(b[j - 8], 1)) * by);
  }
#else
  float decoded[kLanes][kChunk];
  for (int row = 0; row < kLanes; row++) {
    const Chunk value = values<BITS>(rows[row]);
    for (int i = 0; i < kVectors; i++) store(decoded[row] + i * kLanes, value[i] * scale[row]);
  }
  for (int64_t j = 0; j < n; j++)
    for (int row = 0; row < kLanes; row++) panel[j * kWidth + row] = decoded[row][j];
#endif
}

// Decode columns [k0, k1) of rows [n, n + kWidth) to panel[k1 - k0][kWidth]. Rows past the end repeat the last one.
template <int BITS> void fill(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* panel) {
  const uint8_t* stop = end_of(w);
  for (int64_t k = k0; k < k1;) {
    const int64_t group = k / w.group, end = std::min(k1, (group + 1) * w.group);
    for (int64_t part = 0; part < kWidth; part += kLanes) {
      const uint8_t* first[kLanes];
      alignas(32) float scale[kLanes];
      for (int64_t i = 0; i < kLanes; i++) {
        const int64_t row = std::min(n + part + i, w.rows - 1);
        first[i] = codes_at<BITS>(w, row, group, k);
        scale[i] = w.scale[row * w.groups + group] * kUnit<BITS>;
      }
      const bool near_end = (w.rows - n - kWidth) * w.row_bytes() < kRead<BITS>;  // bytes after the panel: near the end a copy may be needed
      for (int64_t from = k; from < end; from += kChunk) {
        const uint8_t* rows[kLanes];
        uint8_t copies[kLanes][32];
        for (int64_t i = 0; i < kLanes; i++) {
          rows[i] = first[i] + (from - k) * BITS / 8;
          if (near_end) rows[i] = readable<BITS>(rows[i], stop, copies[i]);
          else __builtin_prefetch(rows[i] + kWidth * w.row_bytes());
        }
        decode_across<BITS>(rows, scale, std::min<int64_t>(kChunk, end - from), panel + (from - k0) * kWidth + part);
      }
    }
    k = end;
  }
}

// Write sums[M][kWidth] to y[m, n], n within `width`.
inline void finish(const float* sums, int64_t M, int64_t width, Dtype dtype, void* y, int64_t N) {
  for (int64_t m = 0; m < M; m++) narrow(dtype, sums + m * kWidth, width, at(y, dtype, m * N));
}

template <int BITS> void panels(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  float *panel = buffer(kDepth * kWidth + M * kWidth), *sums = panel + kDepth * kWidth;
  for (int64_t n = n0; n < n1; n += kWidth) {
    std::fill(sums, sums + M * kWidth, 0.0f);
    for (int64_t k = 0; k < w.K; k += kDepth) {
      const int64_t end = std::min(w.K, k + kDepth);
      fill<BITS>(w, n, k, end, panel);
      multiply(packed, M, w.K, k, panel, end - k, kWidth, sums);
    }
    finish(sums, M, std::min<int64_t>(kWidth, n1 - n), dtype, at(y, dtype, n), N);
  }
}

template <int BITS> void product(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  if (M <= dot_rows(BITS)) return few<BITS>(w, n0, n1, packed, M, dtype, y, N);
  panels<BITS>(w, n0, n1, packed, M, dtype, y, N);
}

void linear(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  if (w.bits == 8) return product<8>(w, n0, n1, packed, M, dtype, y, N);
  if (w.bits == 6) return product<6>(w, n0, n1, packed, M, dtype, y, N);
  if (w.bits == 16) return product<16>(w, n0, n1, packed, M, dtype, y, N);
  product<12>(w, n0, n1, packed, M, dtype, y, N);
}

// For gradients, decoded rows already lie along a panel's columns. This many are decoded at a time, padded so that they are spread over the cache.
constexpr int64_t kAcross = 64, kAcrossLd = kAcross + kWidth;

template <int BITS> void gradient_of(const Weight& w, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype dtype, void* y) {
  constexpr int64_t depth = kDepth / 2;
  float *panel = buffer(depth * kAcrossLd + M * kAcross), *sums = panel + depth * kAcrossLd;
  for (int64_t k = k0; k < k1; k += kAcross) {
    const int64_t end = std::min(k1, k + kAcross);
    std::fill(sums, sums + M * kAcross, 0.0f);
    for (int64_t n = 0; n < w.rows; n += depth) {
      const int64_t rows = std::min(depth, w.rows - n);
      decode_as<BITS, Dtype::f32>(w, n, n + rows, k, end, panel, kAcrossLd);
      for (int64_t part = 0; part < end - k; part += kWidth) multiply(packed, M, w.rows, n, panel + part, rows, kAcrossLd, sums + part * M);
    }
    for (int64_t part = 0; part < end - k; part += kWidth)
      finish(sums + part * M, M, std::min<int64_t>(kWidth, end - k - part), dtype, at(y, dtype, k + part), w.K);
  }
}

void gradient(const Weight& w, int64_t k0, int64_t k1, const float* packed, int64_t M, Dtype dtype, void* y) {
  if (w.bits == 8) return gradient_of<8>(w, k0, k1, packed, M, dtype, y);
  if (w.bits == 6) return gradient_of<6>(w, k0, k1, packed, M, dtype, y);
  gradient_of<12>(w, k0, k1, packed, M, dtype, y);
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

}  // namespace

#define TEXT(name) #name
#define NAME(name) TEXT(name)
#ifdef __AVX2__
constexpr int64_t kLargestM = 256;
#else
constexpr int64_t kLargestM = 16;
#endif
const Kernels ISA = {NAME(ISA), decode, encode, nullptr, nullptr, nullptr, kLargestM, kChunk, pack, linear, gradient, widen, narrow};

}  // namespace arctic
