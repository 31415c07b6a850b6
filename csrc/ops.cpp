// hiedit._C: the ledger's arithmetic on the CPU. hiedit/ledger/accumulate.py defines the results
// bit by bit; this file checks arguments, packs factors and spreads elements over threads.
//
// Shape letters: O, I out and in features, r rank.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace hiedit {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay

// Default rounding, subnormals kept: torch.set_flush_denormal would change bits otherwise.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

// Calls f(begin, end) on disjoint parts of [0, n) with at most `threads` threads (0: torch's
// number). Parts are of elements, never of the order in which one element is updated.
template <typename F>
void spread(int64_t n, int64_t grain, int64_t threads, const F& f) {
  if (threads > 0) grain = std::max(grain, (n + threads - 1) / threads);
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    DefaultFloatEnvironment environment;
    f(begin, end);
  });
}

void check_fp32(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
}

// A tensor holds either a whole weight or exactly the positions [start, end) of it, as a ZeRO
// shard does. Returns the position of its first element.
int64_t origin_of(const at::Tensor& t, const char* name, int64_t start, int64_t end) {
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides(),
              " for shape ", t.sizes());
  if (t.numel() == end - start) return start;
  TORCH_CHECK(t.numel() >= end, name, " of shape ", t.sizes(), " has ", t.numel(),
              " elements: neither the range [", start, ", ", end, ") nor a weight around it");
  return 0;
}

// The rank rows that take part: all of them, or those whose scale is not zero.
std::vector<int64_t> active_rows(const std::optional<at::Tensor>& scale, int64_t rank) {
  std::vector<int64_t> active;
  const float* s = scale ? scale->const_data_ptr<float>() : nullptr;
  for (int64_t k = 0; k < rank; ++k) {
    if (s == nullptr || s[k] != 0.0f) active.push_back(k);
  }
  return active;
}

// One factor with a stride per axis: value(x, k) = data[x * step + k * rank_step] * scale[k].
struct Factor {
  const float* data;
  int64_t step, rank_step, length;
  const float* scale;
  float value(int64_t x, int64_t k) const {
    const float v = data[x * step + k * rank_step];
    return scale == nullptr ? v : v * scale[k];
  }
};

void pack_rows(const Factor& f, const std::vector<int64_t>& active, int64_t first, int64_t count,
               int64_t threads, std::vector<float>& out) {
  const int64_t rank = active.size();
  out.resize(count * rank);
  spread(count, kGrain / rank + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      for (int64_t k = 0; k < rank; ++k) out[x * rank + k] = f.value(first + x, active[k]);
    }
  });
}

void pack_panels(const Factor& f, const std::vector<int64_t>& active, int64_t threads,
                 std::vector<float>& out) {
  const int64_t rank = active.size(), panels = (f.length + kPanel - 1) / kPanel;
  out.assign(panels * rank * kPanel, 0.0f);
  spread(panels, kGrain / (rank * kPanel) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = std::min(kPanel, f.length - p * kPanel);
      for (int64_t k = 0; k < rank; ++k) {
        float* to = out.data() + (p * rank + k) * kPanel;
        for (int64_t c = 0; c < columns; ++c) to[c] = f.value(p * kPanel + c, active[k]);
      }
    }
  });
}

void check_factors(const at::Tensor& A, const at::Tensor& B,
                   const std::optional<at::Tensor>& scale) {
  check_fp32(A, "A");
  check_fp32(B, "B");
  TORCH_CHECK(A.dim() == 2 && B.dim() == 2 && A.size(0) == B.size(1),
              "A must be [r, I] and B [O, r], got A ", A.sizes(), " and B ", B.sizes());
  if (!scale) return;
  check_fp32(*scale, "scale");
  TORCH_CHECK(scale->dim() == 1 && scale->size(0) == A.size(0), "scale must be [r] with r = ",
              A.size(0), ", got ", scale->sizes());
}

// Checks the arguments of an update and returns the position of acc's first element.
int64_t check_accumulate(const at::Tensor& acc, const at::Tensor& A, const at::Tensor& B,
                         const std::optional<at::Tensor>& scale, int64_t start, int64_t end,
                         int64_t threads) {
  check_fp32(acc, "acc");
  check_factors(A, B, scale);
  const int64_t total = A.size(1) * B.size(0);
  TORCH_CHECK(0 <= start && start <= end && end <= total, "range [", start, ", ", end,
              ") is not within [0, ", total, "), the weight of A ", A.sizes(), " and B ",
              B.sizes());
  const int64_t origin = origin_of(acc, "acc", start, end);
  TORCH_CHECK(acc.numel() == end - start || acc.numel() == total, "acc of shape ", acc.sizes(),
              " must hold the range [", start, ", ", end, ") or the whole weight of ", total,
              " elements");
  TORCH_CHECK(threads >= 0, "threads must be 0 (torch's number) or more, got ", threads);
  return origin;
}

// Checks W and W0 and returns where position 0 of each is.
Weights weights_of(at::Tensor& W, const at::Tensor& W0, int64_t start, int64_t end) {
  const auto dtype = W.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat,
              "W must be bfloat16, float16 or float32, got ", dtype);
  TORCH_CHECK(W0.scalar_type() == dtype, "W0 must have W's dtype ", dtype, ", got ",
              W0.scalar_type());
  TORCH_CHECK(0 <= start && start <= end, "range [", start, ", ", end, ") is not a range");
  const int64_t size = W.element_size();
  const int64_t out = origin_of(W, "W", start, end), base = origin_of(W0, "W0", start, end);
  const Kernels& k = kernels();
  return {reinterpret_cast<intptr_t>(W.mutable_data_ptr()) - out * size,
          reinterpret_cast<intptr_t>(W0.const_data_ptr()) - base * size, size,
          dtype == at::kFloat  ? k.materialize_fp32
          : dtype == at::kHalf ? k.materialize_fp16
                               : k.materialize_bf16};
}

void round_into(const Weights& w, const at::Tensor& acc, int64_t origin, int64_t start,
                int64_t end, int64_t threads) {
  const float* a = acc.const_data_ptr<float>() + (start - origin);
  spread(end - start, kGrain, threads, [&](int64_t from, int64_t to) {
    const int64_t at = (start + from) * w.size;
    w.round(reinterpret_cast<void*>(w.out + at), reinterpret_cast<const void*>(w.base + at),
            a + from, to - from);
  });
}

// The work of accumulate_ and, with weights, of commit_.
void add(at::Tensor& acc, int64_t origin, const at::Tensor& A, const at::Tensor& B,
         const std::optional<at::Tensor>& scale, int64_t start, int64_t end, bool conv1d,
         int64_t threads, const Weights* weights) {
  const at::Tensor a = A.contiguous(), b = B.contiguous();
  const std::optional<at::Tensor> s =
      scale ? std::optional<at::Tensor>(scale->contiguous()) : std::nullopt;
  const std::vector<int64_t> active = active_rows(s, a.size(0));
  if (start == end) return;
  if (active.empty()) {
    if (weights != nullptr) round_into(*weights, acc, origin, start, end, threads);
    return;
  }
  const int64_t rank = a.size(0), in = a.size(1), out = b.size(0);
  const Factor fa{a.const_data_ptr<float>(), 1, in, in, nullptr};
  const Factor fb{b.const_data_ptr<float>(), rank, 1, out,
                  s ? s->const_data_ptr<float>() : nullptr};
  const Factor &by_row = conv1d ? fa : fb, &by_column = conv1d ? fb : fa;
  const int64_t width = by_column.length, first = start / width;
  std::vector<float> rows, panels;
  pack_rows(by_row, active, first, (end - 1) / width - first + 1, threads, rows);
  pack_panels(by_column, active, threads, panels);

  const Packed packed{rows.data(), panels.data(), first, static_cast<int64_t>(active.size()),
                      width};
  float* data = acc.mutable_data_ptr<float>();
  const Kernels& k = kernels();
  spread(end - start, kGrain, threads, [&](int64_t from, int64_t to) {
    k.accumulate(data, origin, packed, start + from, start + to, weights);
  });
}

void accumulate_(at::Tensor& acc, const at::Tensor& A, const at::Tensor& B,
                 const std::optional<at::Tensor>& scale, int64_t start, int64_t end, bool conv1d,
                 int64_t threads) {
  const int64_t origin = check_accumulate(acc, A, B, scale, start, end, threads);
  add(acc, origin, A, B, scale, start, end, conv1d, threads, nullptr);
}

void materialize_(at::Tensor& W, const at::Tensor& W0, const at::Tensor& acc, int64_t start,
                  int64_t end) {
  check_fp32(acc, "acc");
  const Weights weights = weights_of(W, W0, start, end);
  round_into(weights, acc, origin_of(acc, "acc", start, end), start, end, 0);
}

void commit_(at::Tensor& W, const at::Tensor& W0, at::Tensor& acc, const at::Tensor& A,
             const at::Tensor& B, const std::optional<at::Tensor>& scale, int64_t start,
             int64_t end, bool conv1d, int64_t threads) {
  const int64_t origin = check_accumulate(acc, A, B, scale, start, end, threads);
  const Weights weights = weights_of(W, W0, start, end);
  add(acc, origin, A, B, scale, start, end, conv1d, threads, &weights);
}

std::string instruction_set() { return kernels().name; }

}  // namespace

TORCH_LIBRARY(hiedit, m) {
  m.def(
      "accumulate_(Tensor(a!) acc, Tensor A, Tensor B, Tensor? scale, int start, int end, "
      "bool conv1d, int threads) -> ()");
  m.def("materialize_(Tensor(a!) W, Tensor W0, Tensor acc, int start, int end) -> ()");
  m.def(
      "commit_(Tensor(a!) W, Tensor W0, Tensor(b!) acc, Tensor A, Tensor B, Tensor? scale, "
      "int start, int end, bool conv1d, int threads) -> ()");
  m.def("instruction_set() -> str", &instruction_set);
}

TORCH_LIBRARY_IMPL(hiedit, CPU, m) {
  m.impl("accumulate_", &accumulate_);
  m.impl("materialize_", &materialize_);
  m.impl("commit_", &commit_);
}

}  // namespace hiedit

// `import hiedit._C` loads the library, and loading it registers the operators; the module itself
// is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
