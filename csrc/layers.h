// The loops behind csrc/layers.cpp, free of PyTorch: attention, RMSNorm, SiLU * up, and gradients.
//
// Shape letters: T tokens of all sequences, s tokens of one, h query heads, hk key heads, d their
// size, a multiple of 16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// The rest of the extension forbids contraction, because the ledger's bits depend on it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HIEDIT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define HIEDIT_CLONES
#endif
#define HIEDIT_INLINE static inline __attribute__((always_inline))

namespace hiedit {
namespace {

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

HIEDIT_INLINE v8 load(const float* p) {
  v8 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
HIEDIT_INLINE void store(float* p, v8 x) { std::memcpy(p, &x, sizeof x); }
HIEDIT_INLINE v8 fill(float x) { return v8{x, x, x, x, x, x, x, x}; }
HIEDIT_INLINE float total(v8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// x with zeros from lane n on.
HIEDIT_INLINE v8 keep_first(v8 x, int64_t n) {
  const i8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < static_cast<int32_t>(n) ? x : fill(0);
}

// exp to about 2 ulp between -87 and 88, clamped to that range (Cephes' polynomial).
HIEDIT_INLINE v8 exp8(v8 x) {
  const v8 low = fill(-87.0f), high = fill(88.0f), magic = fill(12582912.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const v8 n = (x * fill(1.44269504f) + magic) - magic;
  const v8 r = (x - n * fill(0.693359375f)) + n * fill(2.12194440e-4f);
  v8 y = fill(1.9875691500e-4f);
  y = y * r + fill(1.3981999507e-3f);
  y = y * r + fill(8.3334519073e-3f);
  y = y * r + fill(4.1665795894e-2f);
  y = y * r + fill(1.6666665459e-1f);
  y = y * r + fill(5.0000001201e-1f);
  y = y * (r * r) + r + fill(1.0f);
  const i8 bits = (__builtin_convertvector(n, i8) + 127) << 23;
  v8 scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return y * scale;
}

// out[0..8) = sum_k a[k] * columns[k * stride ..]: four chains, so that latency does not rule.
HIEDIT_INLINE v8 dot_block(const float* a, const float* columns, int64_t stride, int64_t d) {
  v8 s0 = fill(0), s1 = fill(0), s2 = fill(0), s3 = fill(0);
  for (int64_t k = 0; k < d; k += 4, columns += 4 * stride) {
    s0 += fill(a[k]) * load(columns);
    s1 += fill(a[k + 1]) * load(columns + stride);
    s2 += fill(a[k + 2]) * load(columns + 2 * stride);
    s3 += fill(a[k + 3]) * load(columns + 3 * stride);
  }
  return (s0 + s1) + (s2 + s3);
}

// out[0..d) = sum_{j < n} weight[j] * rows[j * stride ..].
HIEDIT_INLINE void weighted_rows(float* out, const float* weight, const float* rows,
                                 int64_t stride, int64_t n, int64_t d) {
  for (int64_t c = 0; c < d; c += 2 * kLanes) {
    v8 s0 = fill(0), s1 = fill(0), t0 = fill(0), t1 = fill(0);
    int64_t j = 0;
    for (; j + 1 < n; j += 2) {
      const float* row = rows + j * stride + c;
      s0 += fill(weight[j]) * load(row);
      s1 += fill(weight[j]) * load(row + kLanes);
      t0 += fill(weight[j + 1]) * load(row + stride);
      t1 += fill(weight[j + 1]) * load(row + stride + kLanes);
    }
    if (j < n) {
      s0 += fill(weight[j]) * load(rows + j * stride + c);
      s1 += fill(weight[j]) * load(rows + j * stride + c + kLanes);
    }
    store(out + c, s0 + t0);
    store(out + c + kLanes, s1 + t1);
  }
}

// rows[j * d ..] += weight[j] * x for j < n.
HIEDIT_INLINE void add_outer(float* rows, const float* weight, const float* x, int64_t n,
                             int64_t d) {
  for (int64_t j = 0; j < n; ++j) {
    const v8 w = fill(weight[j]);
    for (int64_t c = 0; c < d; c += kLanes) {
      store(rows + j * d + c, load(rows + j * d + c) + w * load(x + c));
    }
  }
}

// Rotary position embedding of one head (Su et al. 2021), halves rotated against each other.
HIEDIT_INLINE void rotate(float* out, const float* x, const float* cos, const float* sin,
                          int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const v8 a = load(x + i), b = load(x + i + half);
    store(out + i, a * load(cos + i) - b * load(sin + i));
    store(out + i + half, b * load(cos + i + half) + a * load(sin + i + half));
  }
}

// Its transpose, for gradients.
HIEDIT_INLINE void rotate_back(float* out, const float* g, const float* cos, const float* sin,
                               int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const v8 a = load(g + i), b = load(g + i + half);
    store(out + i, a * load(cos + i) + b * load(sin + i + half));
    store(out + i + half, b * load(cos + i + half) - a * load(sin + i));
  }
}

// columns[k * stride + j] = rows[j * step + k]; beyond s, the last row again.
HIEDIT_INLINE void transpose(float* columns, const float* rows, int64_t step, int64_t s,
                             int64_t stride, int64_t d) {
  const float* row[kLanes];
  for (int64_t j = 0; j < stride; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) row[l] = rows + std::min(j + l, s - 1) * step;
    for (int64_t k = 0; k < d; ++k) {  // eight loads make one vector of a column
      const v8 x = {row[0][k], row[1][k], row[2][k], row[3][k],
                    row[4][k], row[5][k], row[6][k], row[7][k]};
      store(columns + k * stride + j, x);
    }
  }
}

struct Attention {
  const float *q, *k, *v, *cos, *sin;
  int64_t h, hk, d;
  float scale;
};

int64_t padded(int64_t s) { return (s + kLanes - 1) / kLanes * kLanes; }

// One sequence [first, first + s) and one key head with its query heads. work: (2 d + 1) padded(s)
// + s d + d floats. lse: [T, h].
HIEDIT_CLONES
void attend(const Attention& a, int64_t first, int64_t s, int64_t g, float* out, float* lse,
            float* work) {
  const int64_t d = a.d, stride = padded(s), group = a.h / a.hk, kw = a.hk * d, qw = a.h * d;
  float *columns = work, *keys = columns + d * stride, *row = keys + s * d, *query = row + stride;
  for (int64_t j = 0; j < s; ++j) {
    const int64_t t = first + j;
    rotate(keys + j * d, a.k + t * kw + g * d, a.cos + t * d, a.sin + t * d, d);
  }
  transpose(columns, keys, d, s, stride, d);
  for (int64_t head = g * group; head < (g + 1) * group; ++head) {
    for (int64_t i = 0; i < s; ++i) {
      const int64_t t = first + i, n = i + 1;
      rotate(query, a.q + t * qw + head * d, a.cos + t * d, a.sin + t * d, d);
      float top = -INFINITY;
      for (int64_t j = 0; j < n; j += kLanes) {
        store(row + j, dot_block(query, columns + j, stride, d) * fill(a.scale));
      }
      for (int64_t j = 0; j < n; ++j) top = row[j] > top ? row[j] : top;
      v8 sum = fill(0);
      for (int64_t j = 0; j < n; j += kLanes) {
        v8 p = exp8(load(row + j) - fill(top));
        p = keep_first(p, n - j);
        sum += p;
        store(row + j, p);
      }
      const float norm = total(sum);
      lse[t * a.h + head] = top + std::log(norm);
      float* to = out + t * qw + head * d;
      weighted_rows(to, row, a.v + first * kw + g * d, kw, n, d);
      for (int64_t c = 0; c < d; c += kLanes) store(to + c, load(to + c) / fill(norm));
    }
  }
}

// Gradients of the same. work: 2 d padded(s) + 3 s d + 2 padded(s) + 3 d floats.
HIEDIT_CLONES
void attend_back(const Attention& a, const float* grad, const float* lse, int64_t first, int64_t s,
                 int64_t g, float* dq, float* dk, float* dv, float* work) {
  const int64_t d = a.d, stride = padded(s), group = a.h / a.hk, kw = a.hk * d, qw = a.h * d;
  float *columns = work, *values = columns + d * stride, *keys = values + d * stride;
  float *sum_k = keys + s * d, *sum_v = sum_k + s * d, *p = sum_v + s * d, *ds = p + stride;
  float *query = ds + stride, *sum_q = query + d;
  std::fill(sum_k, sum_k + 2 * s * d, 0.0f);
  for (int64_t j = 0; j < s; ++j) {
    const int64_t t = first + j;
    rotate(keys + j * d, a.k + t * kw + g * d, a.cos + t * d, a.sin + t * d, d);
  }
  transpose(columns, keys, d, s, stride, d);
  transpose(values, a.v + first * kw + g * d, kw, s, stride, d);
  for (int64_t head = g * group; head < (g + 1) * group; ++head) {
    for (int64_t i = 0; i < s; ++i) {
      const int64_t t = first + i, n = i + 1;
      const float *cos = a.cos + t * d, *sin = a.sin + t * d, *go = grad + t * qw + head * d;
      rotate(query, a.q + t * qw + head * d, cos, sin, d);
      const v8 shift = fill(lse[t * a.h + head]), scale = fill(a.scale);
      v8 sum = fill(0);
      for (int64_t j = 0; j < n; j += kLanes) {
        v8 w = exp8(dot_block(query, columns + j, stride, d) * scale - shift);
        w = keep_first(w, n - j);
        const v8 dp = dot_block(go, values + j, stride, d);
        store(p + j, w);
        store(ds + j, dp);
        sum += w * dp;
      }
      const v8 delta = fill(total(sum));
      for (int64_t j = 0; j < n; j += kLanes) {
        store(ds + j, load(p + j) * (load(ds + j) - delta) * scale);
      }
      weighted_rows(sum_q, ds, keys, d, n, d);
      rotate_back(dq + t * qw + head * d, sum_q, cos, sin, d);
      add_outer(sum_k, ds, query, n, d);
      add_outer(sum_v, p, go, n, d);
    }
  }
  for (int64_t j = 0; j < s; ++j) {
    const int64_t t = first + j;
    rotate_back(dk + t * kw + g * d, sum_k + j * d, a.cos + t * d, a.sin + t * d, d);
    std::copy(sum_v + j * d, sum_v + (j + 1) * d, dv + t * kw + g * d);
  }
}

HIEDIT_CLONES
void norm_rows(const float* x, const float* w, float* y, float* r, int64_t rows, int64_t d,
               float eps) {
  for (int64_t i = 0; i < rows; ++i, x += d, y += d) {
    v8 sum = fill(0);
    for (int64_t c = 0; c < d; c += kLanes) sum += load(x + c) * load(x + c);
    r[i] = 1.0f / std::sqrt(total(sum) / d + eps);
    const v8 a = fill(r[i]);
    for (int64_t c = 0; c < d; c += kLanes) store(y + c, load(w + c) * (load(x + c) * a));
  }
}

HIEDIT_CLONES
void norm_rows_back(const float* grad, const float* x, const float* w, const float* r, float* dx,
                    int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; ++i, x += d, grad += d, dx += d) {
    v8 sum = fill(0);
    for (int64_t c = 0; c < d; c += kLanes) sum += load(grad + c) * load(w + c) * load(x + c);
    const v8 a = fill(r[i]), b = a * a * a * fill(total(sum) / d);
    for (int64_t c = 0; c < d; c += kLanes) {
      store(dx + c, a * (load(grad + c) * load(w + c)) - b * load(x + c));
    }
  }
}

HIEDIT_CLONES
void gate(const float* g, const float* u, float* out, int64_t n) {
  const v8 one = fill(1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const v8 x = load(g + i);
    store(out + i, x / (one + exp8(-x)) * load(u + i));
  }
}

HIEDIT_CLONES
void gate_back(const float* grad, const float* g, const float* u, float* dg, float* du,
               int64_t n) {
  const v8 one = fill(1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const v8 x = load(g + i), go = load(grad + i), s = one / (one + exp8(-x));
    store(dg + i, go * load(u + i) * s * (one + x * (one - s)));
    store(du + i, go * x * s);
  }
}

}  // namespace
}  // namespace hiedit
