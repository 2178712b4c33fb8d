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
  // The numbers of the codes in the lowest 4 bits of every lane; `sign` has their highest bit in its highest.
  static Floats look_up(__m256i codes, __m256i sign) {
    const Floats low = _mm256_permutevar8x32_ps(load<Floats>(kNF4), codes), high = _mm256_permutevar8x32_ps(load<Floats>(kNF4 + 8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
  }

  static Chunk values(const uint8_t* p) {
    const auto eight = [](const uint8_t* four) {
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(load<int32_t>(four)), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
      return look_up(codes, _mm256_slli_epi32(codes, 28));
    };
    return {eight(p), eight(p + 4)};
  }

  static constexpr int kDotChunk = 64;  // eight codes in each of eight lanes
  static std::array<Floats, 8> dot_values(const uint8_t* p) {
    const __m256i codes = load<__m256i>(p);
    std::array<Floats, 8> result;
    for (int i = 0; i < 8; i++) result[i] = look_up(_mm256_srli_epi32(codes, 4 * (i ^ 1)), _mm256_slli_epi32(codes, 28 - 4 * (i ^ 1)));
    return result;
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
