// The commit as a plain CUDA kernel: per element and rank row acc = fma(b, a, acc), then
// W = round_to_nearest_even(W_0 + acc), W_0's own bits where acc is zero. See commit.h.
//
// A thread keeps kRows x kColumns accumulators in registers while all rank rows go by. The 32 lanes
// of a warp lie along a row, so accumulators and weights are read and written 16 bytes at a time
// and in one stream per row; a row's factor is the same for the whole warp, a column's stays in the
// L1 cache for its other warps. Every element is read and written once, whatever the rank.
#include "commit.h"

#ifndef HIEDIT_HOST
#include <cuda_fp16.h>
#endif

namespace hiedit {
namespace {

constexpr int kRows = 4, kColumns = 8;  // of a thread
constexpr int kLanes = 32, kWarps = 4;  // of a block: lanes along columns, warps along rows

template <Type T>
struct Storage {
  using type = uint16_t;
};
template <>
struct Storage<kFp32> {
  using type = float;
};

__device__ inline float widen_bf16(uint16_t x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

template <Type T>
__device__ inline float widen(typename Storage<T>::type x) {
  if constexpr (T == kBf16) return widen_bf16(x);
  if constexpr (T == kFp16) return __half2float(__ushort_as_half(x));
  if constexpr (T == kFp32) return x;
}

template <Type T>
__device__ inline typename Storage<T>::type narrow(float x) {
  if constexpr (T == kBf16) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  if constexpr (T == kFp16) return __half_as_ushort(__float2half_rn(x));
  if constexpr (T == kFp32) return x;
}

template <typename E>
__device__ inline E* at(int64_t address, int64_t index) {
  return reinterpret_cast<E*>(address + index * static_cast<int64_t>(sizeof(E)));
}

// kColumns neighbours, those in [from, to) of them; 16 bytes at a time where all are and may be.
template <typename E>
struct Row {
  alignas(sizeof(uint4)) E value[kColumns];
  static constexpr int kWords = sizeof(value) / sizeof(uint4);

  __device__ void load(int64_t address, int64_t index, int from, int to) {
    const E* p = at<const E>(address, index);
    if (from == 0 && to == kColumns && reinterpret_cast<intptr_t>(p) % sizeof(uint4) == 0) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        reinterpret_cast<uint4*>(value)[w] = reinterpret_cast<const uint4*>(p)[w];
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] = from <= c && c < to ? p[c] : E(0);
  }

  __device__ void store(int64_t address, int64_t index, int from, int to) const {
    E* p = at<E>(address, index);
    if (from == 0 && to == kColumns && reinterpret_cast<intptr_t>(p) % sizeof(uint4) == 0) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        reinterpret_cast<uint4*>(p)[w] = reinterpret_cast<const uint4*>(value)[w];
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (from <= c && c < to) p[c] = value[c];
    }
  }
};

// The columns [from, to) of a thread's kColumns that lie in the range, for one row.
struct Span {
  int64_t index;
  int from, to;
};

__device__ inline int64_t clamp(int64_t x, int64_t low) {
  return x < low ? low : x > kColumns ? kColumns : x;
}

__device__ inline Span span_of(const Launch& l, int64_t row, int64_t column) {
  const int64_t index = row * l.columns + column;
  const int64_t from = clamp(l.start - index, 0), left = l.columns - column;
  return {index, static_cast<int>(from),
          static_cast<int>(clamp(l.end - index < left ? l.end - index : left, from))};
}

// Adds all rank rows to the tile whose first element is (row, column).
template <Type F>
__device__ void add_rows(const Launch& l, const Entry& e, int64_t row, int64_t column,
                         int64_t last_row, Row<float> (&acc)[kRows]) {
  using E = typename Storage<F>::type;
  const int columns = static_cast<int>(clamp(l.columns - column, 0));
  for (int64_t k = 0; k < e.rank; ++k) {
    const float s = e.scale == 0 ? 1.0f : *at<const float>(e.scale, k * e.scale_rank);
    if (s == 0.0f) continue;  // the row belongs to a masked edit
    Row<E> right;
    if (e.right_column == 1) {
      right.load(e.right, k * e.right_rank + column, 0, columns);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t x = column + (c < columns ? c : 0);
        right.value[c] = *at<const E>(e.right, k * e.right_rank + x * e.right_column);
      }
    }
    float a[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      a[c] = widen<F>(right.value[c]);
      if (!l.scale_left) a[c] = __fmul_rn(a[c], s);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const int64_t y = row + m < last_row ? row + m : last_row - 1;
      const E* p = at<const E>(e.left, y * e.left_row + k * e.left_rank);
      const float left = l.scale_left ? __fmul_rn(widen<F>(*p), s) : widen<F>(*p);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        acc[m].value[c] = __fmaf_rn(left, a[c], acc[m].value[c]);
      }
    }
  }
}

template <Type W>
__device__ void round_row(const Entry& e, const Span& s, const Row<float>& acc) {
  Row<typename Storage<W>::type> base;
  base.load(e.base, s.index, s.from, s.to);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float a = acc.value[c];
    // -0.0 + 0.0 would be +0.0: a zero accumulator gives back W_0's own bits.
    if (a != 0.0f) base.value[c] = narrow<W>(__fadd_rn(widen<W>(base.value[c]), a));
  }
  base.store(e.weight, s.index, s.from, s.to);
}

template <Type W, Type F>
__global__ void __launch_bounds__(kLanes* kWarps) commit(const Launch l) {
  if (l.mask != nullptr && l.mask[blockIdx.y] == 0) return;
  const Entry e = l.entries[blockIdx.y];
  const int64_t tiles = (l.columns + kLanes * kColumns - 1) / (kLanes * kColumns);
  const int64_t last_row = (l.end + l.columns - 1) / l.columns;
  const int64_t tile = blockIdx.x;
  const int64_t column = (tile % tiles * kLanes + threadIdx.x) * kColumns;
  const int64_t row = l.start / l.columns + (tile / tiles * kWarps + threadIdx.y) * kRows;
  if (column >= l.columns || row >= last_row) return;
  Span spans[kRows];
  Row<float> acc[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    spans[m] = span_of(l, row + m, column);
    if (row + m >= last_row) spans[m].from = spans[m].to = 0;
    acc[m].load(e.acc, spans[m].index, spans[m].from, spans[m].to);
  }
  if constexpr (F != kNone) {
    add_rows<F>(l, e, row, column, last_row, acc);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      acc[m].store(e.acc, spans[m].index, spans[m].from, spans[m].to);
    }
  }
  if constexpr (W != kNone) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) round_row<W>(e, spans[m], acc[m]);
  }
}

using Kernel = void (*)(Launch);

template <Type W>
Kernel with_factor(Type factor) {
  switch (factor) {
    case kBf16: return commit<W, kBf16>;
    case kFp16: return commit<W, kFp16>;
    case kFp32: return commit<W, kFp32>;
    default: return commit<W, kNone>;
  }
}

Kernel kernel_of(Type weight, Type factor) {
  switch (weight) {
    case kBf16: return with_factor<kBf16>(factor);
    case kFp16: return with_factor<kFp16>(factor);
    case kFp32: return with_factor<kFp32>(factor);
    default: return with_factor<kNone>(factor);
  }
}

int64_t blocks_of(const Launch& l) {
  const int64_t rows = (l.end + l.columns - 1) / l.columns - l.start / l.columns;
  const int64_t across = (l.columns + kLanes * kColumns - 1) / (kLanes * kColumns);
  return (rows + kWarps * kRows - 1) / (kWarps * kRows) * across;
}

}  // namespace

#ifndef HIEDIT_HOST
extern "C" cudaError_t hiedit_commit(const Launch* launch, cudaStream_t stream) {
  if (launch->modules == 0 || launch->start >= launch->end) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks_of(*launch)),
                  static_cast<unsigned>(launch->modules));
  void* arguments[] = {const_cast<Launch*>(launch)};
  const void* kernel = reinterpret_cast<const void*>(kernel_of(launch->weight, launch->factor));
  return cudaLaunchKernel(kernel, grid, dim3(kLanes, kWarps), arguments, 0, stream);
}
#endif

}  // namespace hiedit
