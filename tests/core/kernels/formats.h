#include <arctic/kernels.h>

namespace arctic {

struct Bits {
  static constexpr int id = 1, bits = 1, unit = 8;
};

extern const Kernels portable;

}  // namespace arctic
