// The two loops behind hiedit._C, free of PyTorch, once per instruction set.
//
// Shapes: a weight is seen as a row-major matrix [R, C] with flat positions row * C + col. For
// nn.Linear R, C = O, I; for Conv1D R, C = I, O. Either way the update is rows @ columns, where
// one side is b' = B * scale and the other A, and a product does not care which comes first.
#pragma once

#include <cstdint>

namespace hiedit {

// Columns per panel and the most rows that a tile keeps in registers.
constexpr int64_t kPanel = 16;
constexpr int64_t kTileRows = 6;

// The factors of one update, packed so that the inner loop reads them in order.
struct Packed {
  const float* rows;    // [R', rank], R' = the rows that the range touches
  const float* panels;  // [ceil(C / kPanel), rank, kPanel], zero beyond column C
  int64_t first_row;    // index in the weight of rows[0]
  int64_t rank;
  int64_t width;  // C
};

// out = round_to_nearest_even(base + acc), n elements of the weight's dtype; base's own bits where
// acc is zero.
using Round = void (*)(void* out, const void* base, const float* acc, int64_t n);

// The weight that a commit writes as it goes. Addresses are those of flat position 0; of a shard
// they may lie before its storage, which is why they are integers.
struct Weights {
  intptr_t out, base;
  int64_t size;  // bytes of one element
  Round round;
};

struct Kernels {
  const char* name;
  // acc[p - origin] for every position p in [begin, end): for k = 0..rank-1, in this order,
  // acc = fma(row[k], column[k], acc). Where weights are given, they are written while acc is in
  // the cache.
  void (*accumulate)(float* acc, int64_t origin, const Packed& packed, int64_t begin, int64_t end,
                     const Weights* weights);
  Round materialize_bf16, materialize_fp16, materialize_fp32;
};

// The fastest set that this CPU runs; all sets give the same bits. HIEDIT_SIMD=generic (read at
// every call, for tests) picks the portable one.
const Kernels& kernels();

}  // namespace hiedit
