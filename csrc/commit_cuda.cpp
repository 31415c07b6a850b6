// Registers the CUDA kernel of commit.cu with PyTorch; compiled only where PyTorch has CUDA.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "commit.h"

namespace hiedit {
namespace {

// The table holds addresses that hiedit/ledger/accumulate.py has checked: nothing in it can be
// checked here. Whoever calls this operator with another table writes where that table says.
void commit_table_(const at::Tensor& table, const std::optional<at::Tensor>& mask, int64_t columns,
                   int64_t start, int64_t end, bool conv1d, int64_t weight, int64_t factor) {
  constexpr int64_t kFields = sizeof(Entry) / sizeof(int64_t);
  TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous() && table.dim() == 2 &&
                  table.size(1) == kFields,
              "table must be contiguous int64 [L, ", kFields, "], got ", table.scalar_type(), " ",
              table.sizes());
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kBool && mask->is_contiguous() &&
                        mask->numel() == table.size(0) && mask->device() == table.device()),
              "mask must be contiguous bool [", table.size(0), "] on ", table.device());
  TORCH_CHECK(columns > 0 && 0 <= start && start <= end, "range [", start, ", ", end, ") of rows of ",
              columns, " is not a range");
  TORCH_CHECK(kNone <= weight && weight <= kFp32 && kNone <= factor && factor <= kFp32,
              "weight and factor must be -1 (none), 0 (bf16), 1 (fp16) or 2 (fp32), got ", weight,
              " and ", factor);
  const c10::cuda::CUDAGuard guard(table.device());
  const Launch launch{reinterpret_cast<const Entry*>(table.const_data_ptr<int64_t>()),
                      mask ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>())
                           : nullptr,
                      table.size(0),
                      columns,
                      start,
                      end,
                      !conv1d,
                      static_cast<Type>(weight),
                      static_cast<Type>(factor)};
  C10_CUDA_CHECK(hiedit_commit(&launch, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hiedit, m) {
  m.def(
      "commit_table_(Tensor table, Tensor? mask, int columns, int start, int end, bool conv1d, "
      "int weight, int factor) -> ()");
}

TORCH_LIBRARY_IMPL(hiedit, CUDA, m) { m.impl("commit_table_", &commit_table_); }

}  // namespace hiedit
