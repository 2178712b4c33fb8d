// What a library's operators are made of: choice of the instruction set, arguments, threads, and products with any number of rows and experts.
// Included by its ops.cpp alone, which is compiled for any processor of the architecture.
// Uses torch's stable ABI (torch/csrc/stable, 2.10 and later), so that one build serves later versions of torch.
#pragma once

#include "kernels.h"

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace arctic {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether this processor has the instructions that a source file is compiled for (arctic_plugins.kernels.INSTRUCTION_SETS).
bool has(const std::string& instruction_set) {
#ifdef __x86_64__
  const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  const bool bf16 = base && __builtin_cpu_supports("avx512bf16");
  if (instruction_set == "amx") {
    // On Linux, a process must request the tile registers: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA (arch/x86 xstate documentation).
    static const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return bf16 && tiles;
  }
  if (instruction_set == "avx512_bf16") return bf16;
  if (instruction_set == "avx512") return base;
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);
  if (instruction_set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C);
#endif
  return instruction_set == "portable";
}

// The kernels in use. `floats` has products in float32: `best` itself, or the kernels of a lesser instruction set if `best` has none.
struct Set {
  const Kernels& best;
  const Kernels& floats;
  int64_t largest_float_m;  // up to this many rows of x, products in float32 are faster than decoding and the library's matrix product
};

// The tables of a library, best first, of which one is in use. `Table` is Kernels or derived from it.
template <typename Table> class Choice {
 public:
  Choice(std::initializer_list<const Table*> tables) : tables_(tables) {}

  // Choose an instruction set by name, or the best one for "". Returns its name, or "" if the processor does not support it.
  std::string use(const std::string& name) {
    for (const Table* table : tables_)
      if ((name.empty() || name == table->name) && has(table->name)) {
        chosen_.store(table);
        return table->name;
      }
    return "";
  }

  const Table& table() const {
    const Table* table = chosen_.load();
    STD_TORCH_CHECK(table != nullptr, "no instruction set was chosen");
    return *table;
  }

  Set set() const {
    const Table& best = table();
    for (auto at = std::find(tables_.begin(), tables_.end(), &best); at != tables_.end(); ++at)  // a processor has all lesser instruction sets too
      if ((*at)->linear_floats) return {best, **at, best.linear_floats ? best.largest_m : 8};
    STD_TORCH_CHECK(false, "a library must have the kernels of portable.h");
  }

 private:
  const std::vector<const Table*> tables_;
  std::atomic<const Table*> chosen_{nullptr};
};

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// The tensor, or a contiguous copy. The usual case needs no call to the dispatcher.
Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// [..., last] as [rows, last].
Tensor matrix(const Tensor& tensor) {
  const int64_t last = tensor.size(tensor.dim() - 1);
  return tensor.dim() == 2 ? packed(tensor) : torch::stable::view(packed(tensor), {last ? tensor.numel() / last : 0, last});
}

// A new tensor like `like`, except for the size of its last dimension.
Tensor new_last(const Tensor& like, int64_t size) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = size;
  return torch::stable::new_empty(like, sizes);
}

int64_t grain(int64_t row_size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size)); }

void decode_into(const Kernels& table, const Weight& w, int64_t row0, int64_t row1, int64_t k0, int64_t k1, Dtype dtype, void* out, int64_t ld) {
  torch::stable::parallel_for(row0, row1, grain(k1 - k0), [&](int64_t from, int64_t to) {
    table.decode(w, from, to, k0, k1, dtype, static_cast<char*>(out) + (from - row0) * ld * size_of(dtype), ld);
  });
}

// out [rows, K], contiguous.
void decode(const Set& set, const Weight& w, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == w.rows && out.size(1) == w.K, "out must be contiguous [rows, in_features]");
  decode_into(set.best, w, 0, w.rows, 0, w.K, dtype_of(out), out.mutable_data_ptr(), w.K);
}

// out = a @ b, computed by the library; out may be a slice of columns.
void matmul_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of the returned tensor
}

// The number of rows (or columns) that are decoded for one call to the library. With fewer, its products are up to twice as slow (oneDNN of torch 2.13).
constexpr int64_t kTile = 1024;

// The number of elements of x that are multiplied with each decoded weight, so that they stay in a core's second-level cache.
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

// This thread's memory for packed rows, kept between calls. It uses huge pages; otherwise the tile loads would miss the TLB.
template <typename T> T* packed_memory(int64_t elements) {
  constexpr size_t kHugePage = 1 << 21;
  struct Free { void operator()(void* p) const { std::free(p); } };
  thread_local std::unique_ptr<void, Free> kept;
  thread_local size_t size = 0;
  const size_t wanted = (static_cast<size_t>(elements) * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
  if (size < wanted) {
    kept.reset(std::aligned_alloc(kHugePage, wanted));
    STD_TORCH_CHECK(kept != nullptr, "out of memory");
    madvise(kept.get(), wanted, MADV_HUGEPAGE);  // only a hint: without it everything works, but more slowly
    size = wanted;
  }
  return static_cast<T*>(kept.get());
}

// Rows [first, first + M) of the input, and the matrix by which they are multiplied.
struct Part {
  Weight w;
  int64_t first, M;
};

// The parts of an input that is sorted by expert. `all` contains the rows of every expert's matrix, one expert after another.
// Rows after those of the last expert belong to no part.
std::vector<Part> parts_of(const Weight& all, const Tensor& counts_of_experts, int64_t input_rows) {
  STD_TORCH_CHECK(counts_of_experts.dim() == 1 && counts_of_experts.is_contiguous() && counts_of_experts.scalar_type() == ScalarType::Long,
                  "counts must be contiguous int64 [experts]");
  const int64_t experts = counts_of_experts.size(0), *counts = counts_of_experts.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(experts > 0 && all.rows % experts == 0, "codes must have as many rows for each expert");
  std::vector<Part> parts;
  int64_t first = 0;
  for (int64_t expert = 0; expert < experts; expert++) {
    Weight w = all;
    w.rows = all.rows / experts;
    w.codes += expert * w.rows * w.row_bytes();
    w.scale += expert * w.rows * w.groups;
    STD_TORCH_CHECK(counts[expert] >= 0 && counts[expert] <= input_rows - first, "counts must add up to at most the rows of the input");
    if (counts[expert]) parts.push_back({w, first, counts[expert]});
    first += counts[expert];
  }
  return parts;
}

// A result like new_last, with zeros in the rows that belong to no part.
Tensor new_result(const std::vector<Part>& parts, const Tensor& like, int64_t size) {
  Tensor result = new_last(like, size);
  const int64_t rows = parts.empty() ? 0 : parts.back().first + parts.back().M;
  const int64_t row_bytes = size * static_cast<int64_t>(size_of(dtype_of(like)));
  std::memset(static_cast<char*>(result.mutable_data_ptr()) + rows * row_bytes, 0, (like.size(0) - rows) * row_bytes);
  return result;
}

// Call run(part, from, to) for all `units` units of every part, on all threads.
template <typename Run> void for_all(const std::vector<Part>& parts, int64_t units, int64_t grain_size, const Run& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()) * units, grain_size, [&](int64_t a, int64_t b) {
    while (a < b) {
      const int64_t part = a / units, from = a % units, to = std::min(units, from + b - a);
      run(part, from, to);
      a += to - from;
    }
  });
}

// y[:, n] of parts with few rows, bfloat16.
void linear_of_few(const Kernels& table, const std::vector<Part>& parts, const uint16_t* x, uint16_t* y) {
  const int64_t K = parts[0].w.K, N = parts[0].w.rows, packed_row = (K + 31) / 32 * 32;
  std::vector<int64_t> at(parts.size(), -1);  // where a part's packed rows are
  uint16_t* packed = nullptr;
  if (table.pack) {
    int64_t elements = 0;
    for (size_t i = 0; i < parts.size(); i++)
      if (parts[i].M > 1) at[i] = elements, elements += (parts[i].M + 15) / 16 * 16 * packed_row;
    if (elements) packed = packed_memory<uint16_t>(elements);
    for (size_t i = 0; i < parts.size(); i++)
      if (at[i] >= 0)
        torch::stable::parallel_for(0, (parts[i].M + 15) / 16, grain(16 * K), [&](int64_t a, int64_t b) {
          table.pack(x + parts[i].first * K, parts[i].M, K, a, b, packed + at[i]);
        });
  }
  for_all(parts, (N + table.rows - 1) / table.rows, grain(table.rows * K), [&](int64_t i, int64_t from, int64_t to) {
    const Part& part = parts[i];
    const uint16_t *rows = x + part.first * K, *packed_rows = at[i] < 0 ? nullptr : packed + at[i];
    const int64_t panel = packed_rows ? std::max<int64_t>(32, kPanelElements / K / 32 * 32) : part.M;
    for (int64_t m = 0; m < part.M; m += panel)
      table.linear(part.w, from * table.rows, std::min(N, to * table.rows), rows + m * K, packed_rows ? packed_rows + m * packed_row : nullptr,
                   std::min(panel, part.M - m), y + (part.first + m) * N, N);
  });
}

// Pack the rows of all parts, `size` columns wide; `at` receives the offset at which the rows of each part begin.
float* pack_floats(const Kernels& table, const std::vector<Part>& parts, Dtype dtype, const char* x, int64_t size, bool of_linear,
                   std::vector<int64_t>& at) {
  const int64_t packed_row = (size + 15) / 16 * 16;
  int64_t elements = 0;
  for (const Part& part : parts) at.push_back(elements), elements += part.M * packed_row;
  float* packed = packed_memory<float>(elements);
  for (size_t i = 0; i < parts.size(); i++) {
    const int64_t M = parts[i].M, block = of_linear ? table.linear_block(parts[i].w, M) : even_block(M);
    torch::stable::parallel_for(0, (M + block - 1) / block, grain(block * size), [&](int64_t a, int64_t b) {
      table.pack_floats(dtype, x + parts[i].first * size * size_of(dtype), M, size, block, a, b, packed + at[i]);
    });
  }
  return packed;
}

// y[:, n] of parts with few rows, any dtype.
void linear_of_few_floats(const Kernels& table, const std::vector<Part>& parts, Dtype dtype, const char* x, char* y) {
  const int64_t K = parts[0].w.K, N = parts[0].w.rows;
  std::vector<int64_t> at;
  const float* packed = pack_floats(table, parts, dtype, x, K, true, at);
  for_all(parts, (N + 15) / 16, grain(16 * K), [&](int64_t i, int64_t from, int64_t to) {
    table.linear_floats(parts[i].w, from * 16, std::min(N, to * 16), packed + at[i], parts[i].M, dtype, y + parts[i].first * N * size_of(dtype), N);
  });
}

// Call product(x, y) in float32, with x itself or a widened copy, and y itself or a temporary that is narrowed into it afterwards.
template <typename Product> void in_floats(const Kernels& table, const Tensor& x, const Tensor& y, const Product& product) {
  const Dtype dtype = dtype_of(x);
  if (dtype == Dtype::f32) return product(x, y);
  Tensor wide_x = torch::stable::empty({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor wide_y = torch::stable::empty({y.size(0), y.size(1)}, ScalarType::Float);
  const auto* from_x = static_cast<const char*>(x.const_data_ptr());
  auto* to_y = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), 32768, [&](int64_t a, int64_t b) {
    table.widen(dtype, from_x + a * size_of(dtype), b - a, wide_x.mutable_data_ptr<float>() + a);
  });
  product(wide_x, wide_y);
  torch::stable::parallel_for(0, y.numel(), 32768, [&](int64_t a, int64_t b) {
    table.narrow(dtype, wide_y.const_data_ptr<float>() + a, b - a, to_y + a * size_of(dtype));
  });
}

void linear_by_tiles(const Kernels& table, const Weight& w, const Tensor& x, const Tensor& y) {
  const Dtype dtype = dtype_of(x);
  for (int64_t n = 0; n < w.rows; n += kTile) {
    const int64_t here = std::min(kTile, w.rows - n);
    Tensor tile = scratch(x, here, w.K), columns = torch::stable::narrow(const_cast<Tensor&>(y), 1, n, here);
    decode_into(table, w, n, n + here, 0, w.K, dtype, tile.mutable_data_ptr(), w.K);
    matmul_into(columns, x, torch::stable::transpose(tile, 0, 1));
  }
}

void linear_of_parts(const Set& set, const std::vector<Part>& parts, Tensor x, Tensor y) {
  const Kernels& table = set.best;
  const Dtype dtype = dtype_of(x);
  const bool by_floats = dtype != Dtype::bf16 || !table.linear;
  const int64_t largest_m = by_floats ? set.largest_float_m : table.largest_m;
  std::vector<Part> few;
  int64_t elements = 0;
  const auto flush = [&] {
    if (few.empty()) return;
    const auto* from = static_cast<const char*>(x.const_data_ptr());
    auto* to = static_cast<char*>(y.mutable_data_ptr());
    if (by_floats) linear_of_few_floats(set.floats, few, dtype, from, to);
    else linear_of_few(table, few, reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to));
    few.clear();
    elements = 0;
  };
  for (const Part& part : parts) {
    if (part.M <= largest_m) {
      few.push_back(part);
      if ((elements += part.M * part.w.K) >= kPanelElements) flush();
      continue;
    }
    Tensor own_x = torch::stable::narrow(x, 0, part.first, part.M), own_y = torch::stable::narrow(y, 0, part.first, part.M);
    const auto product = [&](const Tensor& from, const Tensor& to) { linear_by_tiles(table, part.w, from, to); };
    if (table.linear) product(own_x, own_y);
    else in_floats(table, own_x, own_y, product);
  }
  flush();
}

void gradient_by_tiles(const Kernels& table, const Weight& w, const Tensor& grad, const Tensor& result) {
  const Dtype dtype = dtype_of(grad);
  const int64_t step = w.groups > 1 ? std::max<int64_t>(1, kTile / w.group) * w.group : kTile;
  for (int64_t k = 0; k < w.K; k += step) {
    const int64_t here = std::min(step, w.K - k);
    Tensor tile = scratch(grad, w.rows, here), columns = torch::stable::narrow(const_cast<Tensor&>(result), 1, k, here);
    decode_into(table, w, 0, w.rows, k, k + here, dtype, tile.mutable_data_ptr(), here);
    matmul_into(columns, grad, tile);
  }
}

void gradient_of_parts(const Set& set, const std::vector<Part>& parts, Tensor grad, Tensor result) {
  const Kernels& table = set.best;
  const Dtype dtype = dtype_of(grad);
  const bool by_floats = dtype != Dtype::bf16 || !table.gradient;
  const int64_t largest_m = by_floats ? kLargestFloatGradientM : kLargestGradientM;
  std::vector<Part> few;
  for (const Part& part : parts) {
    if (part.M <= largest_m) {
      few.push_back(part);
      continue;
    }
    Tensor own_grad = torch::stable::narrow(grad, 0, part.first, part.M), own_result = torch::stable::narrow(result, 0, part.first, part.M);
    const auto product = [&](const Tensor& from, const Tensor& to) { gradient_by_tiles(table, part.w, from, to); };
    if (table.gradient) product(own_grad, own_result);
    else in_floats(table, own_grad, own_result, product);
  }
  if (few.empty()) return;
  const int64_t K = few[0].w.K, N = few[0].w.rows, unit = few[0].w.groups > 1 ? few[0].w.group : 32;
  const auto* from_grad = static_cast<const char*>(grad.const_data_ptr());
  auto* to_result = static_cast<char*>(result.mutable_data_ptr());
  std::vector<int64_t> at;
  const float* packed = by_floats ? pack_floats(set.floats, few, dtype, from_grad, N, false, at) : nullptr;
  for_all(few, (K + unit - 1) / unit, grain(unit * N), [&](int64_t i, int64_t from, int64_t to) {
    const Part& part = few[i];
    const int64_t k0 = from * unit, k1 = std::min(K, to * unit);
    char* to_part = to_result + part.first * K * size_of(dtype);
    if (by_floats) return set.floats.gradient_floats(part.w, k0, k1, packed + at[i], part.M, dtype, to_part);
    table.gradient(part.w, k0, k1, reinterpret_cast<const uint16_t*>(from_grad) + part.first * N, part.M, reinterpret_cast<uint16_t*>(to_part));
  });
}

Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 ? tensor : torch::stable::view(tensor, {rows, columns});
}

// input [..., K] -> [..., N].
Tensor linear(const Set& set, const Weight& w, const Tensor& input) {
  const Tensor x = matrix(input);
  STD_TORCH_CHECK(x.size(1) == w.K, "the input must be [..., in_features]");
  const int64_t M = x.size(0);
  Tensor y = new_last(input, w.rows);
  if (M) linear_of_parts(set, {{w, 0, M}}, x, as_matrix(y, M, w.rows));
  return y;
}

// given [..., N] -> [..., K].
Tensor grad_input(const Set& set, const Weight& w, const Tensor& given) {
  const Tensor grad = matrix(given);
  STD_TORCH_CHECK(grad.size(1) == w.rows, "grad must be [..., out_features]");
  const int64_t M = grad.size(0);
  Tensor result = new_last(given, w.K);
  if (M) gradient_of_parts(set, {{w, 0, M}}, grad, as_matrix(result, M, w.K));
  return result;
}

// input [M, K], sorted by expert -> [M, N]; `all` has the rows of every expert's matrix, counts is int64 [experts].
Tensor linear_experts(const Set& set, const Weight& all, const Tensor& input, const Tensor& counts) {
  const Tensor x = matrix(input);
  STD_TORCH_CHECK(x.size(1) == all.K, "the input must be [rows, in_features]");
  const std::vector<Part> parts = parts_of(all, counts, x.size(0));
  Tensor y = new_result(parts, x, all.rows / counts.size(0));
  linear_of_parts(set, parts, x, y);
  return y;
}

// given [M, N], sorted by expert -> [M, K].
Tensor grad_input_experts(const Set& set, const Weight& all, const Tensor& given, const Tensor& counts) {
  const Tensor grad = matrix(given);
  const std::vector<Part> parts = parts_of(all, counts, grad.size(0));
  STD_TORCH_CHECK(grad.size(1) == all.rows / counts.size(0), "grad must be [rows, out_features]");
  Tensor result = new_result(parts, grad, all.K);
  gradient_of_parts(set, parts, grad, result);
  return result;
}

}  // namespace
}  // namespace arctic
