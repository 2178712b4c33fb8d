// The CPU implementations of the operators that kernels/ops.py defines: argument checks, choice of the instruction set, threads.
// Uses torch's stable ABI (torch/csrc/stable, 2.10 and later), so that one build serves later versions of torch.

#include "kernels.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace arctic {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels* supported(const std::string& name) {
  const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  const bool bf16 = base && __builtin_cpu_supports("avx512bf16");
  // Linux gives a process the tile registers when it asks: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA (arch/x86 xstate documentation).
  static const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  if (name == "amx" && bf16 && tiles) return &amx;
  if (name == "avx512_bf16" && bf16) return &avx512_bf16;
  if (name == "avx512" && base) return &avx512;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* table = chosen.load();
  STD_TORCH_CHECK(table != nullptr, "arctic_fp8: no instruction set was chosen");
  return *table;
}

// Choose an instruction set by name, or the best one for "". Returns its name, or "" when the processor does not have it.
std::string use(std::string name) {
  for (const char* candidate : {"amx", "avx512_bf16", "avx512"})
    if (name.empty() || name == candidate)
      if (const Kernels* table = supported(candidate)) {
        chosen.store(table);
        return table->name;
      }
  return "";
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "arctic_fp8: expected float32, bfloat16 or float16");
  }
}

// The tensor, or a contiguous copy: the usual case costs no call of the dispatcher.
Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// [..., last] as [rows, last].
Tensor matrix(const Tensor& tensor) {
  const int64_t last = tensor.size(tensor.dim() - 1);
  return tensor.dim() == 2 ? packed(tensor) : torch::stable::view(packed(tensor), {last ? tensor.numel() / last : 0, last});
}

// A new tensor like `like` but for the size of its last dimension.
Tensor new_last(const Tensor& like, int64_t size) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = size;
  return torch::stable::new_empty(like, sizes);
}

// Codes [rows, groups, bytes] and scale [rows, groups], contiguous, of a weight [rows, K].
Weight weight_of(const Tensor& codes, const Tensor& scale, int64_t bits, int64_t K) {
  STD_TORCH_CHECK(codes.dim() == 3 && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte,
                  "arctic_fp8: codes must be contiguous uint8 [rows, groups, bytes]");
  STD_TORCH_CHECK(scale.is_contiguous() && scale.scalar_type() == ScalarType::Float && scale.numel() == codes.size(0) * codes.size(1),
                  "arctic_fp8: scale must be contiguous float32 [rows, groups]");
  STD_TORCH_CHECK(bits == 8 || bits == 6 || bits == 12, "arctic_fp8: bits must be 6, 8 or 12");
  const int64_t group = codes.size(2) * 8 / bits;
  STD_TORCH_CHECK(group * bits == codes.size(2) * 8 && K <= codes.size(1) * group && K > (codes.size(1) - 1) * group,
                  "arctic_fp8: codes do not fit the number of input features");
  return {codes.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(), codes.size(0), K, codes.size(1), group, static_cast<int>(bits)};
}

int64_t grain(int64_t row_size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size)); }

void decode_into(const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  torch::stable::parallel_for(row0, row1, grain(k1 - k0), [&](int64_t from, int64_t to) {
    kernels().decode(w, from, to, k0, k1, dtype, static_cast<char*>(out) + (from - row0) * ld * size, ld);
  });
}

// out [rows, K], contiguous.
void decode(const Tensor& codes, const Tensor& scale, int64_t bits, const Tensor& out) {
  const int64_t K = out.size(1);
  const Weight w = weight_of(codes, scale, bits, K);
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == w.rows, "arctic_fp8: out must be contiguous [rows, in_features]");
  decode_into(w, 0, w.rows, 0, K, dtype_of(out), out.mutable_data_ptr(), K);
}

// weight [rows, K] into codes and scale; false when it holds what is not finite or beyond `largest`.
bool encode(const Tensor& weight, const Tensor& codes, const Tensor& scale, int64_t bits, double largest, int64_t candidates) {
  const Weight w = weight_of(codes, scale, bits, weight.size(1));
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == w.rows, "arctic_fp8: weight must be contiguous [rows, in_features]");
  const Dtype dtype = dtype_of(weight);
  std::atomic<bool> fine{true};
  torch::stable::parallel_for(0, w.rows, grain(w.K), [&](int64_t from, int64_t to) {
    if (!kernels().encode(w, from, to, dtype, weight.const_data_ptr(), static_cast<float>(largest), static_cast<int>(candidates),
                          codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>()))
      fine = false;
  });
  return fine;
}

// out = a @ b by the library; out may be a slice of columns.
void matmul_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over what the call returned
}

// Rows (or columns) that are decoded for one call of the library. With fewer its products are up to twice as slow (oneDNN of torch 2.13).
constexpr int64_t kTile = 1024;

// Rows of x that are multiplied with each weight that is decoded: they stay in a core's second-level cache.
constexpr int64_t kPanelElements = 1 << 19;

Tensor scratch(const Tensor& like, int64_t rows, int64_t columns) {
  thread_local std::vector<std::pair<ScalarType, Tensor>> kept;
  const ScalarType dtype = like.scalar_type();
  auto found = std::find_if(kept.begin(), kept.end(), [&](const auto& one) { return one.first == dtype; });
  if (found == kept.end() || found->second.numel() < rows * columns) {
    if (found != kept.end()) kept.erase(found);
    kept.emplace_back(dtype, torch::stable::empty({rows * columns}, dtype));
    found = kept.end() - 1;
  }
  Tensor flat = found->second;
  return torch::stable::view(torch::stable::narrow(flat, 0, 0, rows * columns), {rows, columns});
}

// This thread's memory for what pack() makes, kept between calls; in huge pages, without which the tiles' loads miss the translation cache.
uint16_t* packed_memory(int64_t elements) {
  constexpr size_t kHugePage = 1 << 21;
  struct Free { void operator()(void* p) const { std::free(p); } };
  thread_local std::unique_ptr<void, Free> kept;
  thread_local size_t size = 0;
  const size_t wanted = (static_cast<size_t>(elements) * 2 + kHugePage - 1) / kHugePage * kHugePage;
  if (size < wanted) {
    kept.reset(std::aligned_alloc(kHugePage, wanted));
    STD_TORCH_CHECK(kept != nullptr, "arctic_fp8: out of memory");
    madvise(kept.get(), wanted, MADV_HUGEPAGE);  // advice: without it everything works, more slowly
    size = wanted;
  }
  return static_cast<uint16_t*>(kept.get());
}

// input [..., K] -> [..., N].
Tensor linear(const Tensor& input, const Tensor& given_codes, const Tensor& given_scale, int64_t bits) {
  const Tensor x = matrix(input), codes = packed(given_codes), scale = packed(given_scale);
  const int64_t M = x.size(0), K = x.size(1), N = codes.size(0);
  const Weight w = weight_of(codes, scale, bits, K);
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(x);
  Tensor result = new_last(input, N), y = result.dim() == 2 ? result : torch::stable::view(result, {M, N});
  if (M == 0) return result;
  if (dtype == Dtype::bf16 && M <= table.largest_m) {
    const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
    auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
    uint16_t* packed = nullptr;
    if (table.pack && M > 1) {
      const int64_t blocks = (M + 15) / 16;
      packed = packed_memory(blocks * 16 * ((K + 31) / 32 * 32));
      torch::stable::parallel_for(0, blocks, grain(16 * K), [&](int64_t a, int64_t b) { table.pack(from, M, K, a, b, packed); });
    }
    const int64_t panel = packed ? std::max<int64_t>(32, kPanelElements / K / 32 * 32) : M;
    for (int64_t m = 0; m < M; m += panel)
      torch::stable::parallel_for(0, (N + table.rows - 1) / table.rows, grain(table.rows * K), [&](int64_t a, int64_t b) {
        table.linear(w, a * table.rows, std::min(N, b * table.rows), from + m * K, packed + m * ((K + 31) / 32 * 32), std::min(panel, M - m), to + m * N, N);
      });
    return result;
  }
  for (int64_t n = 0; n < N; n += kTile) {
    const int64_t here = std::min(kTile, N - n);
    Tensor tile = scratch(x, here, K), part = torch::stable::narrow(y, 1, n, here);
    decode_into(w, n, n + here, 0, K, dtype, tile.mutable_data_ptr(), K);
    matmul_into(part, x, torch::stable::transpose(tile, 0, 1));
  }
  return result;
}

// given [..., N] -> [..., K].
Tensor grad_input(const Tensor& given, const Tensor& given_codes, const Tensor& given_scale, int64_t bits, int64_t K) {
  const Tensor grad = matrix(given), codes = packed(given_codes), scale = packed(given_scale);
  const int64_t M = grad.size(0), N = grad.size(1);
  const Weight w = weight_of(codes, scale, bits, K);
  STD_TORCH_CHECK(N == w.rows, "arctic_fp8: grad must be [..., out_features]");
  const Dtype dtype = dtype_of(grad);
  const int64_t columns = w.groups > 1 ? std::max<int64_t>(1, kTile / w.group) * w.group : kTile;
  Tensor whole = new_last(given, K), result = whole.dim() == 2 ? whole : torch::stable::view(whole, {M, K});
  for (int64_t k = 0; k < K; k += columns) {
    const int64_t here = std::min(columns, K - k);
    Tensor tile = scratch(grad, N, here), part = torch::stable::narrow(result, 1, k, here);
    decode_into(w, 0, N, k, k + here, dtype, tile.mutable_data_ptr(), here);
    matmul_into(part, grad, tile);
  }
  return whole;
}

}  // namespace
}  // namespace arctic

STABLE_TORCH_LIBRARY_FRAGMENT(arctic_fp8, m) { m.def("use(str instruction_set) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(arctic_fp8, CompositeExplicitAutograd, m) { m.impl("use", TORCH_BOX(&arctic::use)); }

STABLE_TORCH_LIBRARY_IMPL(arctic_fp8, CPU, m) {
  m.impl("encode", TORCH_BOX(&arctic::encode));
  m.impl("decode", TORCH_BOX(&arctic::decode));
  m.impl("linear", TORCH_BOX(&arctic::linear));
  m.impl("grad_input", TORCH_BOX(&arctic::grad_input));
}
