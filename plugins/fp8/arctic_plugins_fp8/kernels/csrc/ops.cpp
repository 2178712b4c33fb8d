// The CPU implementations of the operators that kernels/ops.py defines.

#include <arctic/operators.h>

#include "formats.h"

namespace arctic::fp8 {
namespace {

#ifdef __x86_64__
Choice<FP8Kernels> choice{&amx, &avx512_bf16, &avx512, &avx2, &portable};
#else
Choice<FP8Kernels> choice{&portable};
#endif

std::string use(std::string name) { return choice.use(name); }

// Codes [rows, groups, bytes] and scale [rows, groups], contiguous, of a weight [rows, K].
Weight weight_of(const Tensor& codes, const Tensor& scale, int64_t bits, int64_t K) {
  STD_TORCH_CHECK(codes.dim() == 3 && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte,
                  "codes must be contiguous uint8 [rows, groups, bytes]");
  STD_TORCH_CHECK(scale.is_contiguous() && scale.scalar_type() == ScalarType::Float && scale.numel() == codes.size(0) * codes.size(1),
                  "scale must be contiguous float32 [rows, groups]");
  STD_TORCH_CHECK(bits == 8 || bits == 6 || bits == 12, "bits must be 6, 8 or 12");
  const int64_t group = codes.size(2) * 8 / bits;
  STD_TORCH_CHECK(group * bits == codes.size(2) * 8 && K <= codes.size(1) * group && K > (codes.size(1) - 1) * group,
                  "codes do not fit the number of input features");
  return {codes.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(), codes.size(0), K, codes.size(1), group, static_cast<int>(bits),
          static_cast<int>(bits)};
}

int64_t last(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

void decode(const Tensor& codes, const Tensor& scale, int64_t bits, const Tensor& out) {
  arctic::decode(choice.set(), weight_of(codes, scale, bits, last(out)), out);
}

// Encode weight [rows, K] into codes and scale; returns false if a value is not finite or above `largest`.
bool encode(const Tensor& weight, const Tensor& codes, const Tensor& scale, int64_t bits, double largest, int64_t candidates) {
  const Weight w = weight_of(codes, scale, bits, weight.size(1));
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == w.rows, "weight must be contiguous [rows, in_features]");
  const Dtype dtype = dtype_of(weight);
  const FP8Kernels& table = choice.table();
  std::atomic<bool> fine{true};
  torch::stable::parallel_for(0, w.rows, grain(w.K), [&](int64_t from, int64_t to) {
    if (!table.encode(w, from, to, dtype, weight.const_data_ptr(), static_cast<float>(largest), static_cast<int>(candidates),
                      codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>()))
      fine = false;
  });
  return fine;
}

Tensor linear(const Tensor& x, const Tensor& given_codes, const Tensor& given_scale, int64_t bits) {
  const Tensor codes = packed(given_codes), scale = packed(given_scale);
  return arctic::linear(choice.set(), weight_of(codes, scale, bits, last(x)), x);
}

// input [..., K] in float32, weight [N, K] in bfloat16 -> [..., N] in float32, without a whole weight in float32.
Tensor linear_bf16(const Tensor& input, const Tensor& given) {
  const Tensor x = matrix(input), weight = packed(given);
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1);
  STD_TORCH_CHECK(dtype_of(x) == Dtype::f32 && dtype_of(weight) == Dtype::bf16 && weight.dim() == 2 && weight.size(1) == K,
                  "expected float32 [..., in_features] and bfloat16 [out_features, in_features]");
  thread_local std::vector<float> ones;
  if (static_cast<int64_t>(ones.size()) < N) ones.resize(N, 1.0f);
  const Weight w{static_cast<const uint8_t*>(weight.const_data_ptr()), ones.data(), N, K, 1, K, 16, 16};
  const Set set = choice.set();
  Tensor y = new_last(input, N), y_MN = as_matrix(y, M, N);
  if (M) linear_of_parts({set.floats, set.floats, set.largest_float_m}, {{w, 0, M}}, x, y_MN);
  return y;
}

Tensor grad_input(const Tensor& grad, const Tensor& given_codes, const Tensor& given_scale, int64_t bits, int64_t K) {
  const Tensor codes = packed(given_codes), scale = packed(given_scale);
  return arctic::grad_input(choice.set(), weight_of(codes, scale, bits, K), grad);
}

Tensor linear_experts(const Tensor& x, const Tensor& given_codes, const Tensor& given_scale, int64_t bits, const Tensor& counts) {
  const Tensor codes = packed(given_codes), scale = packed(given_scale);
  return arctic::linear_experts(choice.set(), weight_of(codes, scale, bits, last(x)), x, counts);
}

Tensor grad_input_experts(const Tensor& grad, const Tensor& given_codes, const Tensor& given_scale, int64_t bits, int64_t K, const Tensor& counts) {
  const Tensor codes = packed(given_codes), scale = packed(given_scale);
  return arctic::grad_input_experts(choice.set(), weight_of(codes, scale, bits, K), grad, counts);
}

}  // namespace
}  // namespace arctic::fp8

STABLE_TORCH_LIBRARY_FRAGMENT(arctic_fp8, m) { m.def("use(str instruction_set) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(arctic_fp8, CompositeExplicitAutograd, m) { m.impl("use", TORCH_BOX(&arctic::fp8::use)); }

STABLE_TORCH_LIBRARY_IMPL(arctic_fp8, CPU, m) {
  m.impl("encode", TORCH_BOX(&arctic::fp8::encode));
  m.impl("decode", TORCH_BOX(&arctic::fp8::decode));
  m.impl("linear", TORCH_BOX(&arctic::fp8::linear));
  m.impl("linear_bf16", TORCH_BOX(&arctic::fp8::linear_bf16));
  m.impl("grad_input", TORCH_BOX(&arctic::fp8::grad_input));
  m.impl("linear_experts", TORCH_BOX(&arctic::fp8::linear_experts));
  m.impl("grad_input_experts", TORCH_BOX(&arctic::fp8::grad_input_experts));
}
