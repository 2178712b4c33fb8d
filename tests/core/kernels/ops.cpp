#include <arctic/operators.h>

#include "formats.h"

namespace arctic::signs {
namespace {

Choice<Kernels> choice{&portable};

std::string use(std::string name) { return choice.use(name); }

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  const int64_t rows = codes.size(0), K = x.size(x.dim() - 1);
  const Weight w{codes.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(), rows, K, 1, codes.size(1) * 8, Bits::bits, Bits::id};
  return arctic::linear(choice.set(), w, x);
}

}  // namespace
}  // namespace arctic::signs

STABLE_TORCH_LIBRARY_FRAGMENT(arctic_signs, m) { m.def("use(str instruction_set) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(arctic_signs, CompositeExplicitAutograd, m) { m.impl("use", TORCH_BOX(&arctic::signs::use)); }
STABLE_TORCH_LIBRARY_IMPL(arctic_signs, CPU, m) { m.impl("linear", TORCH_BOX(&arctic::signs::linear)); }
