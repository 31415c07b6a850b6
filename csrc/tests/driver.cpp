// The kernels against a plain loop, for the sanitizers: tests/test_sanitizers.py compiles this with
// each of them. No PyTorch; every buffer is exactly as long as it may be, so one element too far is
// an error, and threads work on ranges that meet inside a row.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include <c10/util/Half.h>

#include "../kernels.h"

namespace {

std::mt19937 generator(7);

std::vector<float> normal(int64_t n, float scale) {
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = draw(generator);
  return values;
}

uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

// One dtype: how it is read, how it is rounded (finite values only), and the kernel for it.
struct Bf16 {
  using T = uint16_t;
  static float widen(T x) {
    const uint32_t u = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
  }
  static T round(float x) {  // by halves compared, not by the kernel's addition
    const uint32_t u = bits(x), rest = u & 0xffffu, kept = u >> 16;
    const bool up = rest > 0x8000u || (rest == 0x8000u && (kept & 1u) != 0);
    return static_cast<T>(kept + (up ? 1 : 0));
  }
  static hiedit::Round kernel(const hiedit::Kernels& k) { return k.materialize_bf16; }
};
struct Fp16 {
  using T = uint16_t;
  static float widen(T x) { return c10::detail::fp16_ieee_to_fp32_value(x); }
  static T round(float x) { return c10::detail::fp16_ieee_from_fp32_value(x); }
  static hiedit::Round kernel(const hiedit::Kernels& k) { return k.materialize_fp16; }
};
struct Fp32 {
  using T = float;
  static float widen(T x) { return x; }
  static T round(float x) { return x; }
  static hiedit::Round kernel(const hiedit::Kernels& k) { return k.materialize_fp32; }
};

void fail(const char* what, int64_t R, int64_t C, int64_t rank, int64_t p) {
  std::fprintf(stderr, "%s differs at %lld of %lld x %lld, rank %lld\n", what, (long long)p,
               (long long)R, (long long)C, (long long)rank);
  std::exit(1);
}

// The positions [begin, end) of an R x C weight, held as a shard, by `threads` threads.
template <typename D>
void check(int64_t R, int64_t C, int64_t rank, int64_t begin, int64_t end, int threads) {
  using T = typename D::T;
  const int64_t n = end - begin, first = begin / C, last = (end - 1) / C;
  const std::vector<float> left = normal(R * rank, 1.0f), right = normal(rank * C, 1.0f);
  std::vector<float> acc = normal(n, 1.0f);
  std::vector<T> base(n), out(n);
  for (T& b : base) b = D::round(normal(1, 1.0f)[0]);
  // What the kernel may touch and no more: the rows of the range, whole panels of columns.
  const std::vector<float> rows(left.begin() + first * rank, left.begin() + (last + 1) * rank);
  const int64_t panels = (C + hiedit::kPanel - 1) / hiedit::kPanel;
  std::vector<float> packed(panels * rank * hiedit::kPanel, 0.0f);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      packed[((c / hiedit::kPanel) * rank + k) * hiedit::kPanel + c % hiedit::kPanel] =
          right[k * C + c];
    }
  }

  std::vector<float> expected = acc;
  for (int64_t p = 0; p < n; ++p) {
    const int64_t row = (begin + p) / C, column = (begin + p) % C;
    for (int64_t k = 0; k < rank; ++k) {
      expected[p] = std::fma(left[row * rank + k], right[k * C + column], expected[p]);
    }
  }

  const hiedit::Kernels& k = hiedit::kernels();
  const hiedit::Packed factors{rows.data(), packed.data(), first, rank, C};
  const int64_t size = sizeof(T);
  const hiedit::Weights weights{reinterpret_cast<intptr_t>(out.data()) - begin * size,
                                reinterpret_cast<intptr_t>(base.data()) - begin * size, size,
                                D::kernel(k)};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    const int64_t from = begin + n * t / threads, to = begin + n * (t + 1) / threads;
    if (from == to) continue;
    pool.emplace_back(
        [&, from, to] { k.accumulate(acc.data(), begin, factors, from, to, &weights); });
  }
  for (std::thread& thread : pool) thread.join();

  for (int64_t p = 0; p < n; ++p) {
    const T rounded = D::round(D::widen(base[p]) + expected[p]);
    if (bits(acc[p]) != bits(expected[p])) fail("acc", R, C, rank, p);
    if (std::memcmp(&out[p], &rounded, sizeof(T)) != 0) fail("W", R, C, rank, p);
  }
  std::vector<T> again(n);
  D::kernel(k)(again.data(), base.data(), acc.data(), n);
  if (std::memcmp(again.data(), out.data(), n * sizeof(T)) != 0) fail("round", R, C, rank, 0);
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1},  {5, 3, 2},   {6, 16, 1},    {7, 17, 3},
                               {13, 48, 33}, {3, 501, 4}, {601, 2, 5}, {26, 2051, 40}};
  int64_t cases = 0;
  for (const auto& [R, C, rank] : shapes) {
    const int64_t n = R * C;
    const int64_t ranges[][2] = {{0, n}, {n / 3, n}, {0, n - n / 5}, {n / 7, n / 7 + 1},
                                 {n / 4, n - n / 6}};
    for (const auto& [begin, end] : ranges) {
      if (begin == end) continue;
      for (int threads : {1, 3}) {
        check<Bf16>(R, C, rank, begin, end, threads);
        check<Fp16>(R, C, rank, begin, end, threads);
        check<Fp32>(R, C, rank, begin, end, threads);
        cases += 3;
      }
    }
  }
  check<Bf16>(8, 65539, 1, 5, 8 * 65539 - 3, 1);  // more than a commit's chunk
  ++cases;
  std::printf("%s: %lld cases\n", hiedit::kernels().name, (long long)cases);
  return 0;
}
