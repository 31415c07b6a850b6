// Compiles kernels.inl once per instruction set and picks one when called.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include <c10/util/Half.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HIEDIT_X86 1
#include <immintrin.h>
#endif

#if defined(__clang__)
#define HIEDIT_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#define HIEDIT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define HIEDIT_IVDEP _Pragma("GCC ivdep")
#define HIEDIT_UNROLL _Pragma("GCC unroll 16")
#else
#define HIEDIT_IVDEP
#define HIEDIT_UNROLL
#endif

namespace hiedit {

// ---- portable: std::fma is one instruction on arm64 and a correctly rounded libm call elsewhere.
#define HIEDIT_TARGET
namespace generic {
struct Vec {
  static constexpr int64_t size = 4;
  float v[4];
  static inline Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static inline Vec fill(float x) { return {{x, x, x, x}}; }
  inline void store(float* p) const { std::memcpy(p, v, sizeof v); }
  static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    Vec r;
    for (int i = 0; i < 4; ++i) r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return r;
  }
};
static void materialize_fp16(void* to, const void* from, const float* acc, int64_t n) {
  auto* out = static_cast<uint16_t*>(to);
  auto* base = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) {
    if (acc[i] == 0.0f) {
      out[i] = base[i];
      continue;
    }
    const float w = c10::detail::fp16_ieee_to_fp32_value(base[i]);
    out[i] = c10::detail::fp16_ieee_from_fp32_value(w + acc[i]);
  }
}
#include "kernels.inl"
const Kernels table = {"generic", accumulate, materialize_bf16, materialize_fp16, materialize_fp32};
}  // namespace generic
#undef HIEDIT_TARGET

// ---- x86 with AVX2, FMA and F16C; the target is set per function so that the file itself, and
// whatever inline code it shares with others, stays runnable on any x86-64.
#ifdef HIEDIT_X86
#define HIEDIT_TARGET __attribute__((target("avx2,fma,f16c")))
namespace avx2 {
struct Vec {
  static constexpr int64_t size = 8;
  __m256 v;
  HIEDIT_TARGET static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  HIEDIT_TARGET static inline Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  HIEDIT_TARGET inline void store(float* p) const { _mm256_storeu_ps(p, v); }
  HIEDIT_TARGET static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
};
HIEDIT_TARGET static inline void add_fp16_8(uint16_t* out, const uint16_t* base,
                                            const float* acc) {
  const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(base));
  const __m256 a = _mm256_loadu_ps(acc);
  const __m256 sum = _mm256_add_ps(_mm256_cvtph_ps(kept), a);
  const __m128i rounded = _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i zero = _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ));
  const __m128i mask =
      _mm_packs_epi32(_mm256_castsi256_si128(zero), _mm256_extracti128_si256(zero, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_blendv_epi8(rounded, kept, mask));
}
HIEDIT_TARGET static void materialize_fp16(void* to, const void* from, const float* acc,
                                           int64_t n) {
  auto* out = static_cast<uint16_t*>(to);
  auto* base = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) add_fp16_8(out + i, base + i, acc + i);
  if (i == n) return;
  uint16_t b[8] = {}, o[8];
  float a[8] = {};
  std::memcpy(b, base + i, (n - i) * sizeof(uint16_t));
  std::memcpy(a, acc + i, (n - i) * sizeof(float));
  add_fp16_8(o, b, a);
  std::memcpy(out + i, o, (n - i) * sizeof(uint16_t));
}
#include "kernels.inl"
const Kernels table = {"avx2", accumulate, materialize_bf16, materialize_fp16, materialize_fp32};
}  // namespace avx2
#undef HIEDIT_TARGET
#endif

const Kernels& kernels() {
#ifdef HIEDIT_X86
  const char* choice = std::getenv("HIEDIT_SIMD");
  const bool forced = choice != nullptr && std::strcmp(choice, "generic") == 0;
  static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  if (fast && !forced) return avx2::table;
#endif
  return generic::table;
}

}  // namespace hiedit
