// Formats for AVX-512, compiled with -DISA=avx512 and with -DISA=avx512_bf16.

#include <arctic/avx512.h>

#include "formats.h"

namespace arctic {
namespace {

struct Tables {
  alignas(64) float number[16] = {};
  alignas(64) uint16_t bf16[32] = {};
  alignas(64) uint8_t byte[64] = {};
  alignas(64) uint16_t shift[32] = {};
  constexpr Tables() {
    for (int i = 0; i < 32; i++) {
      number[i % 16] = kNF4[i % 16];
      const uint32_t bits = std::bit_cast<uint32_t>(kNF4[i % 16]);
      bf16[i] = static_cast<uint16_t>((bits + (bits >> 16 & 1) + 0x7FFF) >> 16);
      byte[2 * i] = byte[2 * i + 1] = static_cast<uint8_t>(i / 2);
      shift[i] = i % 2 ? 0 : 4;
    }
  }
};
constexpr Tables tables;  // computed by the compiler: no code of this file may run at load time, as the processor may lack its instructions

// Looking up words takes the lowest 5 bits of an index, so that tables hold the sixteen numbers twice; looking up floats takes the lowest 4.
struct NF4 : NF4Codes {
  static constexpr int kGroup = 64;

  // Codes in the lowest 4 bits of every lane, anything in the other bits.
  static __m512i load(const uint8_t* p, int64_t n = kChunk) {
    const __m128i bytes = n == kChunk ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                      : _mm_maskz_loadu_epi8(static_cast<__mmask16>(first(n / 2)), p);
    const __m512i twice = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), arctic::load(tables.byte));
    return _mm512_srlv_epi16(twice, arctic::load(tables.shift));
  }
  static __m512i bf16(__m512i codes) { return look_up(codes, arctic::load(tables.bf16)); }
  static std::array<__m512, 2> floats(__m512i codes) {
    const __m512 numbers = _mm512_load_ps(tables.number);
    return {_mm512_permutexvar_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes)), numbers),
            _mm512_permutexvar_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1)), numbers)};
  }
  static __m512i scaled_table(__m512 scale) {
    return _mm512_broadcast_i64x4(narrow(_mm512_mul_ps(_mm512_load_ps(tables.number), scale)));
  }
  static __m512i look_up(__m512i codes, __m512i table) { return _mm512_permutexvar_epi16(codes, table); }
};

struct Int8 : Int8Codes {
  using Numbers = std::array<__m512, 2>;
  static Numbers load(const uint8_t* p, int64_t n = kChunk) {
    const __m256i bytes = n == kChunk ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                      : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first(n)), p);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes))),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)))};
  }
  static __m512i bf16(const Numbers& numbers) {  // exact
#ifdef __AVX512BF16__
    return narrow(numbers[0], numbers[1]);
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(upper(numbers[0])), upper(numbers[1]), 1);
#endif
  }
  static __m256i upper(__m512 number) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(number), 16)); }
  static Numbers floats(const Numbers& numbers) { return numbers; }
};

}  // namespace

extern constinit const Kernels ISA = products<Formats<NF4, Int8>>(ARCTIC_NAME(ISA));

}  // namespace arctic
