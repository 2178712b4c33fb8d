// Formats for every processor, compiled with -DISA=avx2 and with -DISA=portable.

#include <arctic/portable.h>

#include "formats.h"

namespace arctic {
namespace {

struct NF4 : NF4Codes {
  static constexpr float kUnit = 1;
  static constexpr int kDotRows = 8;
  static constexpr int64_t kRead = kChunk / 2;

#ifdef __AVX2__
  struct Table {
    Floats low, high;
  };
  static Table scaled_table(float scale) { return {load<Floats>(kNF4) * scale, load<Floats>(kNF4 + 8) * scale}; }

  // The numbers of the codes in the lowest 4 bits of every lane; `sign` has their highest bit in its highest.
  static Floats choose(__m256i codes, __m256i sign, const Table& table) {
    const Floats low = _mm256_permutevar8x32_ps(table.low, codes), high = _mm256_permutevar8x32_ps(table.high, codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
  }

  static Chunk values(const uint8_t* p) {
    const auto eight = [](const uint8_t* four) {
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(load<int32_t>(four)), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
      return choose(codes, _mm256_slli_epi32(codes, 28), scaled_table(1));
    };
    return {eight(p), eight(p + 4)};
  }

  static constexpr int kGroup = 64, kDotChunk = 64;  // eight codes in each of eight lanes
  static Floats look_up(const uint8_t* p, int i, const Table& table) {
    const __m256i codes = load<__m256i>(p);
    return choose(_mm256_srli_epi32(codes, 4 * (i ^ 1)), _mm256_slli_epi32(codes, 28 - 4 * (i ^ 1)), table);
  }
#else
  static Chunk values(const uint8_t* p) {
    float result[kChunk];
    for (int i = 0; i < kChunk; i++) result[i] = kNF4[i % 2 ? p[i / 2] & 15 : p[i / 2] >> 4];
    return load<Chunk>(result);
  }
#endif
};

struct Int8 : Int8Codes {
  static constexpr float kUnit = 1;
  static constexpr int kDotRows = 16;
  static constexpr int64_t kRead = kChunk;

  static Chunk values(const uint8_t* p) {
    Chunk result;
    for (int i = 0; i < kVectors; i++) {
#ifdef __AVX2__
      result[i] = number((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * kLanes))));
#else
      typedef int8_t Bytes __attribute__((vector_size(kLanes)));
      result[i] = __builtin_convertvector(load<Bytes>(p + i * kLanes), Floats);
#endif
    }
    return result;
  }
};

}  // namespace

extern constinit const Kernels ISA = products<Formats<NF4, Int8>>(ARCTIC_NAME(ISA));

}  // namespace arctic
