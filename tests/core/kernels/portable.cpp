#include <arctic/portable.h>

#include "formats.h"

namespace arctic {
namespace {

struct Signs : Bits {
  static constexpr float kUnit = 1;
  static constexpr int kDotRows = 8;
  static constexpr int64_t kRead = 2;
  static Chunk values(const uint8_t* p) {
    float result[kChunk];
    for (int i = 0; i < kChunk; i++) result[i] = p[i / 8] >> (i % 8) & 1 ? 1.0f : -1.0f;
    return load<Chunk>(result);
  }
};

}  // namespace

extern constinit const Kernels ISA = products<Formats<Signs>>(ARCTIC_NAME(ISA));

}  // namespace arctic
