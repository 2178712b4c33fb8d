// The CPU implementations of the operators that ops.py defines.

#include <arctic/operators.h>

#include <optional>

#include "formats.h"

namespace arctic::bnb {
namespace {

#ifdef __x86_64__
Choice<Kernels> choice{&avx512_bf16, &avx512, &avx2, &portable};
#else
Choice<Kernels> choice{&portable};
#endif

std::string use(std::string name) { return choice.use(name); }

constexpr int64_t kBlock = 64;

void check_scales(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == rows * columns, what);
}

// A weight in nf4: codes [rows, blocks, 32] and the scales of blocks, which are float32, or doubly quantized: then scaled() must decode them before use.
class NF4Weight {
 public:
  NF4Weight(const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset, int64_t K)
      : codes_(packed(codes)), absmax_(packed(absmax)) {
    STD_TORCH_CHECK(codes_.dim() == 3 && codes_.scalar_type() == ScalarType::Byte && codes_.size(2) == kBlock / 2 && K > 0 &&
                        codes_.size(1) == (K + kBlock - 1) / kBlock,
                    "codes must be uint8 [rows, ceil(in_features / 64), 32]");
    const int64_t rows = codes_.size(0), blocks = codes_.size(1);
    nested_ = scale.has_value();
    STD_TORCH_CHECK(nested_ == offset.has_value(), "scale and offset belong together");
    check_scales(absmax_, nested_ ? ScalarType::Byte : ScalarType::Float, rows, blocks, "absmax must be [rows, blocks]: float32, or uint8 with a scale");
    weight_ = {codes_.const_data_ptr<uint8_t>(), nullptr, rows, K, blocks, kBlock, NF4Codes::bits, NF4Codes::id};
    if (!nested_) {
      weight_.scale = absmax_.const_data_ptr<float>();
      return;
    }
    scale_ = packed(*scale), offset_ = packed(*offset);
    check_scales(*scale_, ScalarType::Float, rows, 1, "scale must be float32 [rows, 1]");
    check_scales(*offset_, ScalarType::Float, rows, 1, "offset must be float32 [rows, 1]");
    thread_local std::vector<float> memory;  // kept between calls
    if (static_cast<int64_t>(memory.size()) < rows * blocks) memory.resize(static_cast<size_t>(rows * blocks));
    weight_.scale = memory.data();
  }

  // The weight, with the scales of rows [row0, row1) decoded.
  const Weight& scaled(int64_t row0, int64_t row1) {
    if (!nested_) return weight_;
    const uint8_t* from = absmax_.const_data_ptr<uint8_t>();
    const float *scale = scale_->const_data_ptr<float>(), *offset = offset_->const_data_ptr<float>();
    auto* to = const_cast<float*>(weight_.scale);
    torch::stable::parallel_for(row0, row1, grain(weight_.groups), [&](int64_t a, int64_t b) {
      for (int64_t row = a; row < b; row++)
        for (int64_t i = row * weight_.groups; i < (row + 1) * weight_.groups; i++) to[i] = kDynamicMap[from[i]] * scale[row] + offset[row];
    });
    return weight_;
  }

  const Weight& scaled() { return scaled(0, weight_.rows); }

  // The same for the rows of those experts that have any of `rows`.
  const Weight& scaled(const Tensor& counts, int64_t rows) {
    for (const Part& part : parts_of(weight_, counts, rows)) {
      const int64_t first = (part.w.codes - weight_.codes) / weight_.row_bytes();
      scaled(first, first + part.w.rows);
    }
    return weight_;
  }

 private:
  Tensor codes_, absmax_;
  std::optional<Tensor> scale_, offset_;
  Weight weight_;
  bool nested_;
};

// A weight in int8: codes [rows, 1, K], absmax float32 [rows, 1], both contiguous.
Weight int8_weight(const Tensor& codes, const Tensor& absmax) {
  STD_TORCH_CHECK(codes.dim() == 3 && codes.scalar_type() == ScalarType::Char && codes.size(1) == 1, "codes must be int8 [rows, 1, in_features]");
  check_scales(absmax, ScalarType::Float, codes.size(0), 1, "absmax must be float32 [rows, 1]");
  const int64_t K = codes.size(2);
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), absmax.const_data_ptr<float>(), codes.size(0), K, 1, K, Int8Codes::bits, Int8Codes::id};
}

using Optional = std::optional<Tensor>;

void decode_nf4(const Tensor& codes, const Tensor& absmax, const Optional& scale, const Optional& offset, const Tensor& out) {
  arctic::decode(choice.set(), NF4Weight(codes, absmax, scale, offset, out.size(1)).scaled(), out);
}

Tensor linear_nf4(const Tensor& x, const Tensor& codes, const Tensor& absmax, const Optional& scale, const Optional& offset, int64_t K) {
  return arctic::linear(choice.set(), NF4Weight(codes, absmax, scale, offset, K).scaled(), x);
}

Tensor grad_input_nf4(const Tensor& grad, const Tensor& codes, const Tensor& absmax, const Optional& scale, const Optional& offset, int64_t K) {
  return arctic::grad_input(choice.set(), NF4Weight(codes, absmax, scale, offset, K).scaled(), grad);
}

Tensor linear_experts_nf4(const Tensor& x, const Tensor& codes, const Tensor& absmax, const Optional& scale, const Optional& offset, int64_t K,
                          const Tensor& counts) {
  return arctic::linear_experts(choice.set(), NF4Weight(codes, absmax, scale, offset, K).scaled(counts, x.size(0)), x, counts);
}

Tensor grad_input_experts_nf4(const Tensor& grad, const Tensor& codes, const Tensor& absmax, const Optional& scale, const Optional& offset, int64_t K,
                              const Tensor& counts) {
  return arctic::grad_input_experts(choice.set(), NF4Weight(codes, absmax, scale, offset, K).scaled(counts, grad.size(0)), grad, counts);
}

void decode_int8(const Tensor& given, const Tensor& given_absmax, const Tensor& out) {
  const Tensor codes = packed(given), absmax = packed(given_absmax);
  arctic::decode(choice.set(), int8_weight(codes, absmax), out);
}

Tensor linear_int8(const Tensor& x, const Tensor& given, const Tensor& given_absmax) {
  const Tensor codes = packed(given), absmax = packed(given_absmax);
  return arctic::linear(choice.set(), int8_weight(codes, absmax), x);
}

Tensor grad_input_int8(const Tensor& grad, const Tensor& given, const Tensor& given_absmax) {
  const Tensor codes = packed(given), absmax = packed(given_absmax);
  return arctic::grad_input(choice.set(), int8_weight(codes, absmax), grad);
}

Tensor linear_experts_int8(const Tensor& x, const Tensor& given, const Tensor& given_absmax, const Tensor& counts) {
  const Tensor codes = packed(given), absmax = packed(given_absmax);
  return arctic::linear_experts(choice.set(), int8_weight(codes, absmax), x, counts);
}

Tensor grad_input_experts_int8(const Tensor& grad, const Tensor& given, const Tensor& given_absmax, const Tensor& counts) {
  const Tensor codes = packed(given), absmax = packed(given_absmax);
  return arctic::grad_input_experts(choice.set(), int8_weight(codes, absmax), grad, counts);
}

}  // namespace
}  // namespace arctic::bnb

STABLE_TORCH_LIBRARY_FRAGMENT(arctic_bnb, m) { m.def("use(str instruction_set) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(arctic_bnb, CompositeExplicitAutograd, m) { m.impl("use", TORCH_BOX(&arctic::bnb::use)); }

STABLE_TORCH_LIBRARY_IMPL(arctic_bnb, CPU, m) {
  m.impl("decode_nf4", TORCH_BOX(&arctic::bnb::decode_nf4));
  m.impl("linear_nf4", TORCH_BOX(&arctic::bnb::linear_nf4));
  m.impl("grad_input_nf4", TORCH_BOX(&arctic::bnb::grad_input_nf4));
  m.impl("linear_experts_nf4", TORCH_BOX(&arctic::bnb::linear_experts_nf4));
  m.impl("grad_input_experts_nf4", TORCH_BOX(&arctic::bnb::grad_input_experts_nf4));
  m.impl("decode_int8", TORCH_BOX(&arctic::bnb::decode_int8));
  m.impl("linear_int8", TORCH_BOX(&arctic::bnb::linear_int8));
  m.impl("grad_input_int8", TORCH_BOX(&arctic::bnb::grad_input_int8));
  m.impl("linear_experts_int8", TORCH_BOX(&arctic::bnb::linear_experts_int8));
  m.impl("grad_input_experts_int8", TORCH_BOX(&arctic::bnb::grad_input_experts_int8));
}
