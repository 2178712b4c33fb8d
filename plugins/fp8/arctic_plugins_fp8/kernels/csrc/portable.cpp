// Kernels over small vectors, which g++ and clang turn into what the processor has; float32 products. Compiled as -DISA=avx2 with AVX2, FMA and F16C
// (intrinsics where a compiler does not find the instruction), and as -DISA=portable with what every processor of the architecture has.

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

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
inline Ints bits_of(Floats value) { return reinterpret_cast<Ints&>(value); }
inline Floats floats_of(Ints value) { return reinterpret_cast<Floats&>(value); }
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

// Magnitudes (as bits) to a narrower format, to nearest even; what is too large becomes `top`.
template <int MANTISSA, int BIAS> inline Ints rounded(Ints magnitude, int32_t top) {
  constexpr int shift = 23 - MANTISSA;
  const Ints normal = ((magnitude + ((magnitude >> shift) & 1) + ((1 << (shift - 1)) - 1)) >> shift) - ((127 - BIAS) << MANTISSA);
  // Adding a constant whose last mantissa bit is worth one subnormal step leaves the rounded number of steps in the low bits of the sum.
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

template <Dtype D> constexpr int64_t kSize = D == Dtype::f32 ? 4 : 2;

// n numbers from one dtype to another.
template <Dtype FROM, Dtype TO> void convert(const void* from, int64_t n, void* to) {
  const auto* in = static_cast<const char*>(from);
  auto* out = static_cast<char*>(to);
  for (; n >= kLanes; n -= kLanes, in += kLanes * kSize<FROM>, out += kLanes * kSize<TO>) store_as<TO>(out, load_as<FROM>(in));
  if (n <= 0) return;
  alignas(32) char last[kLanes * 4] = {}, result[kLanes * 4];
  std::memcpy(last, in, static_cast<size_t>(n * kSize<FROM>));
  store_as<TO>(result, load_as<FROM>(last));
  std::memcpy(out, result, static_cast<size_t>(n * kSize<TO>));
}

void widen(Dtype dtype, const void* from, int64_t n, float* to) {
  if (dtype == Dtype::bf16) return convert<Dtype::bf16, Dtype::f32>(from, n, to);
  if (dtype == Dtype::f16) return convert<Dtype::f16, Dtype::f32>(from, n, to);
  std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

void narrow(Dtype dtype, const float* from, int64_t n, void* to) {
  if (dtype == Dtype::bf16) return convert<Dtype::f32, Dtype::bf16>(from, n, to);
  if (dtype == Dtype::f16) return convert<Dtype::f32, Dtype::f16>(from, n, to);
  std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

const char* at(const void* p, Dtype dtype, int64_t i) { return static_cast<const char*>(p) + i * (dtype == Dtype::f32 ? 4 : 2); }
char* at(void* p, Dtype dtype, int64_t i) { return static_cast<char*>(p) + i * (dtype == Dtype::f32 ? 4 : 2); }

// ---- Decoding ----------------------------------------------------------------------------------------------------------------------------------

#ifdef __AVX2__

// Values come divided by a power of two: moved into the places of a float16, whose bias is larger, which widens them, subnormals included.
template <int BITS> constexpr float kUnit = BITS == 6 ? 0x1p12f : 0x1p8f;

// The 16 codes at p as float16 bits.
template <int BITS> inline __m256i halves(const uint8_t* p) {
  if constexpr (BITS == 8) {
    const __m256i codes = _mm256_cvtepi8_epi16(load<__m128i>(p));
    return _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
  } else if constexpr (BITS == 6) {  // each code to the top of 16 bits, by a product, then down to its place with its sign
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

template <int BITS> inline Chunk values(const uint8_t* p) {
  const __m256i half = halves<BITS>(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}

#else

template <int BITS> constexpr float kUnit = 1;

template <int BITS> inline Chunk values(const uint8_t* p) {
  using F = Format<BITS>;
  int32_t codes[kChunk];
  if constexpr (BITS == 8) {
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

// values() reads so many bytes.
template <int BITS> constexpr int64_t kRead = kChunk * BITS / 8 + (BITS == 8 ? 0 : 4);

inline const uint8_t* end_of(const Weight& w) { return w.codes + w.rows * w.row_bytes(); }

// What values() may read instead of p: p, or a copy where the codes end.
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
  switch (dtype) {
    case Dtype::f32: return decode_as<BITS, Dtype::f32>(w, r0, r1, k0, k1, out, ld);
    case Dtype::bf16: return decode_as<BITS, Dtype::bf16>(w, r0, r1, k0, k1, out, ld);
    case Dtype::f16: return decode_as<BITS, Dtype::f16>(w, r0, r1, k0, k1, out, ld);
  }
}

void decode(const Weight& w, int64_t r0, int64_t r1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  if (w.bits == 8) return decode_to<8>(w, r0, r1, k0, k1, dtype, out, ld);
  if (w.bits == 6) return decode_to<6>(w, r0, r1, k0, k1, dtype, out, ld);
  return decode_to<12>(w, r0, r1, k0, k1, dtype, out, ld);
}

// ---- Encoding ----------------------------------------------------------------------------------------------------------------------------------

// This thread's own memory for `count` floats, kept between calls.
float* buffer(int64_t count) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < count) kept.resize(static_cast<size_t>(count));
  return kept.data();
}

// 16 codes, the first n of them (whole bytes).
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

// The squared error of the magnitudes value[0, size) (padded with zeros) with a scale.
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
      std::fill(value + size, value + padded, 0.0f);  // the padding after the last weight too, as zeros
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

// ---- Products of up to kDotRows rows: codes are decoded in registers, each scale multiplies its group's sum --------------------------------------

inline int64_t padded(int64_t size) { return (size + kChunk - 1) / kChunk * kChunk; }

template <int BITS, int ROWS, int M> void dots(const Weight& w, int64_t n0, const float* x, Dtype dtype, void* y, int64_t N) {
  constexpr int kChains = M == 1 ? 2 : 1;  // sums that do not wait for each other, where rows of x are too few for that
  const int64_t ld = padded(w.K), row_bytes = w.row_bytes();
  const uint8_t* stop = end_of(w);
  float total[ROWS][M] = {};
  for (int64_t group = 0; group < w.groups; group++) {
    const int64_t from = group * w.group, size = std::min(w.group, w.K - from);
    const uint8_t* codes = w.codes + n0 * row_bytes + group * w.group_bytes();
    const int64_t sure = std::min(size, (stop - codes - (ROWS - 1) * row_bytes - kRead<BITS>) * 8 / BITS + kChunk);
    Floats sum[ROWS][M][kChains] = {};
    int64_t k = 0;
    for (; k + kChunk <= sure; k += kChunk) {
      for (int row = 0; row < ROWS; row++) {
        const uint8_t* here = codes + row * row_bytes + k * BITS / 8;
        __builtin_prefetch(here + ROWS * row_bytes);  // where the next rows will be read
        const Chunk value = values<BITS>(here);
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kVectors; i++) sum[row][m][i % kChains] += value[i] * load<Floats>(x + m * ld + from + k + i * kLanes);
      }
    }
    for (; k < size; k += kChunk) {
      float columns[M][kChunk] = {};  // what is behind the group counts as zero
      for (int m = 0; m < M; m++) std::memcpy(columns[m], x + m * ld + from + k, static_cast<size_t>(std::min<int64_t>(kChunk, size - k)) * 4);
      for (int row = 0; row < ROWS; row++) {
        uint8_t copy[32];
        const Chunk value = values<BITS>(readable<BITS>(codes + row * row_bytes + k * BITS / 8, stop, copy));
        for (int m = 0; m < M; m++)
          for (int i = 0; i < kVectors; i++) sum[row][m][i % kChains] += value[i] * load<Floats>(columns[m] + i * kLanes);
      }
    }
    for (int row = 0; row < ROWS; row++) {
      const float scale = w.scale[(n0 + row) * w.groups + group] * kUnit<BITS>;
      for (int m = 0; m < M; m++) {
        Floats both = sum[row][m][0];
        if constexpr (kChains == 2) both += sum[row][m][1];
        total[row][m] += sum_of(both) * scale;
      }
    }
  }
  for (int m = 0; m < M; m++) {
    float result[ROWS];
    for (int row = 0; row < ROWS; row++) result[row] = total[row][m];
    narrow(dtype, result, ROWS, at(y, dtype, m * N + n0));
  }
}

template <int BITS, int M> void dots(const Weight& w, int64_t n0, int64_t n1, const float* x, Dtype dtype, void* y, int64_t N) {
  for (; n0 + 4 <= n1; n0 += 4) dots<BITS, 4, M>(w, n0, x, dtype, y, N);
  for (; n0 < n1; n0++) dots<BITS, 1, M>(w, n0, x, dtype, y, N);
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

// The same for M rows of what pack() made of [M, whole]: those at k.
void multiply(const float* packed, int64_t M, int64_t whole, int64_t k, const float* panel, int64_t size, int64_t ld, float* sums) {
  const int64_t block = float_block(M);
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

// Columns [k, k + n), n at most 16, of kLanes rows to panel[n][kWidth].
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
      store(panel + j * kWidth, _mm256_cvtph_ps(_mm256_castsi256_si128(b[j])) * by);
      store(panel + (8 + j) * kWidth, _mm256_cvtph_ps(_mm256_extracti128_si256(b[j], 1)) * by);
    }
  } else {
    for (int64_t j = 0; j < n; j++)
      store(panel + j * kWidth, _mm256_cvtph_ps(j < 8 ? _mm256_castsi256_si128(b[j]) : _mm256_extracti128_si256(b[j - 8], 1)) * by);
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

// Columns [k0, k1) of rows [n, n + kWidth) to panel[k1 - k0][kWidth]. Rows that are not there are the last one.
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
      const bool near_end = n + kWidth >= w.rows;  // where a copy may be needed
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

// sums[M][kWidth] to y[m, n], n within `width`.
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
  static_assert(kDotRows == 3);
  if (M == 1) return dots<BITS, 1>(w, n0, n1, packed, dtype, y, N);
  if (M == 2) return dots<BITS, 2>(w, n0, n1, packed, dtype, y, N);
  if (M == 3) return dots<BITS, 3>(w, n0, n1, packed, dtype, y, N);
  panels<BITS>(w, n0, n1, packed, M, dtype, y, N);
}

void linear(const Weight& w, int64_t n0, int64_t n1, const float* packed, int64_t M, Dtype dtype, void* y, int64_t N) {
  if (w.bits == 8) return product<8>(w, n0, n1, packed, M, dtype, y, N);
  if (w.bits == 6) return product<6>(w, n0, n1, packed, M, dtype, y, N);
  product<12>(w, n0, n1, packed, M, dtype, y, N);
}

// Rows that are decoded for gradients lie along a panel's columns already: so many at a time, and more room, which spreads them over the cache.
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
void pack(Dtype dtype, const void* x, int64_t M, int64_t size, int64_t block0, int64_t block1, float* packed) {
  const int64_t block = float_block(M);
  for (int64_t m = block0 * block; m < std::min(M, block1 * block); m += block) {
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
