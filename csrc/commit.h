// The commit on a GPU behind a plain C interface: raw addresses and a stream, nothing of PyTorch.
// hiedit/ledger/accumulate.py defines the result bit by bit.
//
// Shapes: L modules, weights stored row-major as [R, C]; r rank.
#pragma once

#include <cstdint>

#ifndef HIEDIT_HOST  // csrc/tests/commit_host.cpp runs the kernel on the CPU
#include <cuda_runtime_api.h>
#endif

namespace hiedit {

// One row per module; hiedit_kernels/table.py fills them in. Addresses are those of flat position
// 0, which for a shard may lie before its storage. left [R, r] and right [r, C] are the factors as
// the stored weight sees them. Strides in elements. scale 0: none.
struct Entry {
  int64_t acc, weight, base, left, right, scale, rank;
  int64_t left_row, left_rank, right_rank, right_column, scale_rank;
};

enum Type : int32_t { kNone = -1, kBf16 = 0, kFp16 = 1, kFp32 = 2 };

struct Launch {
  const Entry* entries;  // [modules], on the device
  const uint8_t* mask;   // [modules], on the device: 0 leaves a module untouched; or null
  int64_t modules, columns, start, end;
  bool scale_left;      // the scale belongs to the left factor (B of a linear layer)
  Type weight, factor;  // kNone: do not round; do not accumulate
};

// Queues the update of the flat range [start, end) of every module on `stream`.
#ifndef HIEDIT_HOST
extern "C" cudaError_t hiedit_commit(const Launch* launch, cudaStream_t stream);
#endif

}  // namespace hiedit
