// csrc/commit.cu on the CPU, thread by thread: a shared library whose only function takes the
// arguments of a launch. It shows what the kernel computes and touches, not how fast.
#define HIEDIT_HOST
#include <bit>
#include <cmath>
#include <cstdint>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct Index {
  unsigned x, y;
};
static Index blockIdx, threadIdx;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

static float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
static uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static _Float16 __ushort_as_half(uint16_t x) { return std::bit_cast<_Float16>(x); }
static uint16_t __half_as_ushort(_Float16 x) { return std::bit_cast<uint16_t>(x); }
static float __half2float(_Float16 x) { return static_cast<float>(x); }
static _Float16 __float2half_rn(float x) { return static_cast<_Float16>(x); }

#include "../commit.cu"

extern "C" void commit_on_host(const hiedit::Entry* entries, const uint8_t* mask, int64_t modules,
                               int64_t columns, int64_t start, int64_t end, int scale_left,
                               int weight, int factor) {
  using namespace hiedit;
  const Launch launch{entries,        mask,      modules,
                      columns,        start,     end,
                      scale_left != 0, Type(weight), Type(factor)};
  const Kernel kernel = kernel_of(launch.weight, launch.factor);
  const auto blocks = static_cast<unsigned>(blocks_of(launch));
  for (blockIdx.y = 0; blockIdx.y < modules; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (threadIdx.y = 0; threadIdx.y < kWarps; ++threadIdx.y) {
        for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) kernel(launch);
      }
    }
  }
}
