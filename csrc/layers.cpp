// What stands between the matrix products of a Llama-like layer, on the CPU in fp32: rotary causal
// attention over packed sequences, RMSNorm, SiLU * up; each with its gradient. One pass over memory
// where PyTorch takes five to ten. hiedit/backbone/fused.py has the definitions in PyTorch.
//
// Shape letters: T tokens of all sequences, N sequences, s tokens of one, h query heads, hk key
// heads, d their size.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "layers.h"

namespace hiedit {
namespace {

void check(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device().is_cpu(), name,
              " must be a contiguous float32 tensor on the CPU, got ", t.scalar_type(),
              " of strides ", t.strides());
}

Attention attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& starts,
                       double scale) {
  check(q, "q"), check(k, "k"), check(v, "v"), check(cos, "cos"), check(sin, "sin");
  TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && v.sizes() == k.sizes() && cos.dim() == 2 &&
                  sin.sizes() == cos.sizes() && q.size(0) == k.size(0) && cos.size(0) == q.size(0),
              "q must be [T, h d], k and v [T, hk d], cos and sin [T, d]; got ", q.sizes(), ", ",
              k.sizes(), ", ", v.sizes(), ", ", cos.sizes(), ", ", sin.sizes());
  const int64_t d = cos.size(1);
  TORCH_CHECK(d > 0 && d % 16 == 0 && q.size(1) % d == 0 && k.size(1) % d == 0 &&
                  k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "the size of a head must be a multiple of 16 that divides q and k, got ", d, " for ",
              q.sizes(), " and ", k.sizes());
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.is_contiguous() && starts.dim() == 1 &&
                  starts.numel() > 0,
              "starts must be contiguous int64 [N + 1]");
  const int64_t* at = starts.const_data_ptr<int64_t>();
  const int64_t n = starts.numel() - 1;
  bool sound = at[0] == 0 && at[n] == q.size(0);
  for (int64_t i = 0; i < n; ++i) sound = sound && at[i] <= at[i + 1];
  TORCH_CHECK(sound, "starts must rise from 0 to T = ", q.size(0));
  return {q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
          cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), q.size(1) / d, k.size(1) / d,
          d, static_cast<float>(scale)};
}

// Calls f(first, s, key head, work) for all sequences and key heads; `rows` and `fixed` say how
// many floats of work a sequence needs: rows * padded(s) + fixed.
template <typename F>
void over_heads(const at::Tensor& starts, int64_t heads, int64_t rows, int64_t fixed, const F& f) {
  const int64_t* at = starts.const_data_ptr<int64_t>();
  at::parallel_for(0, (starts.numel() - 1) * heads, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> work;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / heads, s = at[n + 1] - at[n];
      if (s == 0) continue;
      work.resize(std::max<size_t>(work.size(), rows * padded(s) + fixed));
      f(at[n], s, task % heads, work.data());
    }
  });
}

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos,
    const at::Tensor& sin, const at::Tensor& starts, double scale) {
  const Attention a = attention_of(q, k, v, cos, sin, starts, scale);
  at::Tensor out = at::empty_like(q), lse = at::empty({q.size(0), a.h}, q.options());
  float *o = out.mutable_data_ptr<float>(), *l = lse.mutable_data_ptr<float>();
  over_heads(starts, a.hk, 2 * a.d + 1, a.d, [&](int64_t first, int64_t s, int64_t g, float* w) {
    attend(a, first, s, g, o, l, w);
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& starts, const at::Tensor& lse,
    double scale) {
  const Attention a = attention_of(q, k, v, cos, sin, starts, scale);
  check(grad, "grad"), check(lse, "lse");
  TORCH_CHECK(grad.sizes() == q.sizes() && lse.numel() == q.size(0) * a.h, "grad and lse must fit q");
  at::Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  const float *go = grad.const_data_ptr<float>(), *l = lse.const_data_ptr<float>();
  float *pq = dq.mutable_data_ptr<float>(), *pk = dk.mutable_data_ptr<float>();
  float* pv = dv.mutable_data_ptr<float>();
  over_heads(starts, a.hk, 5 * a.d + 2, 2 * a.d,
             [&](int64_t first, int64_t s, int64_t g, float* w) {
               attend_back(a, go, l, first, s, g, pq, pk, pv, w);
             });
  return {dq, dk, dv};
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                            double eps) {
  check(x, "x"), check(weight, "weight");
  const int64_t d = weight.numel();
  TORCH_CHECK(d > 0 && d % kLanes == 0 && x.dim() > 0 && x.size(-1) == d,
              "x must be [..., d] and weight [d] with d a multiple of 8, got ", x.sizes(), " and ",
              weight.sizes());
  const int64_t rows = x.numel() / d;
  at::Tensor y = at::empty_like(x), r = at::empty({rows}, x.options());
  const float *px = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *py = y.mutable_data_ptr<float>(), *pr = r.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 64, [&](int64_t b, int64_t e) {
    norm_rows(px + b * d, w, py + b * d, pr + b, e - b, d, static_cast<float>(eps));
  });
  return {y, r};
}

at::Tensor rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& r) {
  check(grad, "grad"), check(x, "x"), check(weight, "weight"), check(r, "r");
  const int64_t d = weight.numel();
  TORCH_CHECK(grad.sizes() == x.sizes() && d % kLanes == 0 && r.numel() * d == x.numel(),
              "grad, x and r must fit, got ", grad.sizes(), ", ", x.sizes(), ", ", r.sizes());
  at::Tensor dx = at::empty_like(x);
  const float *pg = grad.const_data_ptr<float>(), *px = x.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *pr = r.const_data_ptr<float>();
  float* out = dx.mutable_data_ptr<float>();
  at::parallel_for(0, r.numel(), 64, [&](int64_t b, int64_t e) {
    norm_rows_back(pg + b * d, px + b * d, w, pr + b, out + b * d, e - b, d);
  });
  return dx;
}

void check_gate(const at::Tensor& g, const at::Tensor& u) {
  check(g, "gate"), check(u, "up");
  TORCH_CHECK(g.sizes() == u.sizes() && g.numel() % kLanes == 0,
              "gate and up must have one shape, a multiple of 8 elements, got ", g.sizes(), " and ",
              u.sizes());
}

at::Tensor silu_mul(const at::Tensor& g, const at::Tensor& u) {
  check_gate(g, u);
  at::Tensor out = at::empty_like(g);
  const float *pg = g.const_data_ptr<float>(), *pu = u.const_data_ptr<float>();
  float* po = out.mutable_data_ptr<float>();
  at::parallel_for(0, g.numel() / kLanes, 1 << 12, [&](int64_t b, int64_t e) {
    gate(pg + b * kLanes, pu + b * kLanes, po + b * kLanes, (e - b) * kLanes);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& grad, const at::Tensor& g,
                                                     const at::Tensor& u) {
  check_gate(g, u), check_gate(grad, u);
  at::Tensor dg = at::empty_like(g), du = at::empty_like(u);
  const float *pg = g.const_data_ptr<float>(), *pu = u.const_data_ptr<float>();
  const float* go = grad.const_data_ptr<float>();
  float *a = dg.mutable_data_ptr<float>(), *b = du.mutable_data_ptr<float>();
  at::parallel_for(0, g.numel() / kLanes, 1 << 12, [&](int64_t from, int64_t to) {
    const int64_t i = from * kLanes;
    gate_back(go + i, pg + i, pu + i, a + i, b + i, (to - from) * kLanes);
  });
  return {dg, du};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hiedit, m) {
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor starts, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor "
      "sin, Tensor starts, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor r) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(hiedit, CPU, m) {
  m.impl("packed_attention", &packed_attention);
  m.impl("packed_attention_backward", &packed_attention_backward);
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("silu_mul", &silu_mul);
  m.impl("silu_mul_backward", &silu_mul_backward);
}

}  // namespace hiedit
