// The loops themselves. Included by kernels.cpp once per instruction set, inside a namespace that
// defines Vec (load, store, fill, fma) and with HIEDIT_TARGET set; no include guard on purpose.
//
// One tile is up to kTileRows rows by kPanel columns held in registers while all rank rows go by:
// the order of every element's updates is that of the rank, whatever the tile, and an element is
// read and written once however high the rank.

template <int M>
HIEDIT_TARGET inline void tile(float* acc, int64_t ld, const float* rows, const float* panel,
                               int64_t rank) {
  constexpr int64_t V = kPanel / Vec::size;
  Vec c[M][V];
  HIEDIT_UNROLL
  for (int m = 0; m < M; ++m) {
    HIEDIT_UNROLL
    for (int64_t v = 0; v < V; ++v) c[m][v] = Vec::load(acc + m * ld + v * Vec::size);
  }
  for (int64_t k = 0; k < rank; ++k) {
    Vec a[V];
    HIEDIT_UNROLL
    for (int64_t v = 0; v < V; ++v) a[v] = Vec::load(panel + k * kPanel + v * Vec::size);
    HIEDIT_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec b = Vec::fill(rows[m * rank + k]);
      HIEDIT_UNROLL
      for (int64_t v = 0; v < V; ++v) c[m][v] = Vec::fma(b, a[v], c[m][v]);
    }
  }
  HIEDIT_UNROLL
  for (int m = 0; m < M; ++m) {
    HIEDIT_UNROLL
    for (int64_t v = 0; v < V; ++v) c[m][v].store(acc + m * ld + v * Vec::size);
  }
}

// Columns [lo, hi) of one panel, for M rows: through a buffer, since a tile is kPanel wide.
template <int M>
HIEDIT_TARGET inline void edge(float* acc, int64_t ld, const float* rows, const float* panel,
                               int64_t rank, int64_t lo, int64_t hi) {
  float buffer[M * kPanel] = {};
  for (int m = 0; m < M; ++m) {
    std::memcpy(buffer + m * kPanel + lo, acc + m * ld + lo, (hi - lo) * sizeof(float));
  }
  tile<M>(buffer, kPanel, rows, panel, rank);
  for (int m = 0; m < M; ++m) {
    std::memcpy(acc + m * ld + lo, buffer + m * kPanel + lo, (hi - lo) * sizeof(float));
  }
}

// Columns [lo, hi) of M rows that begin at `acc` (the address of column 0).
template <int M>
HIEDIT_TARGET void strip(float* acc, const Packed& packed, const float* rows, int64_t lo,
                         int64_t hi) {
  for (int64_t p = lo / kPanel; p * kPanel < hi; ++p) {
    const int64_t at = p * kPanel;
    const float* panel = packed.panels + p * packed.rank * kPanel;
    const int64_t from = std::max(lo - at, int64_t{0}), to = std::min(hi - at, kPanel);
    if (from == 0 && to == kPanel) {
      tile<M>(acc + at, packed.width, rows, panel, packed.rank);
    } else {
      edge<M>(acc + at, packed.width, rows, panel, packed.rank, from, to);
    }
  }
}

HIEDIT_TARGET void accumulate_part(float* acc, int64_t origin, const Packed& packed, int64_t begin,
                                   int64_t end) {
  const int64_t width = packed.width, rank = packed.rank;
  // Address of column 0 of a row. It may lie before the storage of a shard, hence the integer sum.
  const auto row_address = [&](int64_t row) {
    return reinterpret_cast<float*>(reinterpret_cast<intptr_t>(acc) +
                                    (row * width - origin) * int64_t{sizeof(float)});
  };
  const auto row_factors = [&](int64_t row) {
    return packed.rows + (row - packed.first_row) * rank;
  };
  int64_t first = begin / width, last = end / width;  // whole rows are [first, last)
  const int64_t head = begin % width, tail = end % width;
  if (head != 0) {
    const int64_t hi = first == last ? tail : width;
    strip<1>(row_address(first), packed, row_factors(first), head, hi);
    if (first == last) return;
    ++first;
  }
  if (tail != 0) strip<1>(row_address(last), packed, row_factors(last), 0, tail);

  // Column blocks whose panels stay in the second-level cache while all rows pass by.
  constexpr int64_t kBytes = 192 * 1024;
  const int64_t per_panel = rank * kPanel * int64_t{sizeof(float)};
  const int64_t block = std::max(kBytes / per_panel, int64_t{1}) * kPanel;
  for (int64_t lo = 0; lo < width; lo += block) {
    const int64_t hi = std::min(lo + block, width);
    int64_t row = first;
    for (; row + kTileRows <= last; row += kTileRows) {
      strip<kTileRows>(row_address(row), packed, row_factors(row), lo, hi);
    }
    for (; row < last; ++row) strip<1>(row_address(row), packed, row_factors(row), lo, hi);
  }
}

// With weights, in chunks of whole rows that the last-level cache still holds when they are
// rounded. Rounding strip by strip would need less cache and was slower: many short streams of
// memory instead of three long ones (docs/benchmarks.md).
HIEDIT_TARGET void accumulate(float* acc, int64_t origin, const Packed& packed, int64_t begin,
                              int64_t end, const Weights* weights) {
  if (weights == nullptr) return accumulate_part(acc, origin, packed, begin, end);
  constexpr int64_t kBytes = 1536 * 1024;
  const int64_t strip_bytes = kTileRows * packed.width * int64_t{sizeof(float)};
  const int64_t rows = std::max(kBytes / strip_bytes, int64_t{1}) * kTileRows;
  for (int64_t from = begin; from < end;) {
    const int64_t to = std::min((from / packed.width + rows) * packed.width, end);
    accumulate_part(acc, origin, packed, from, to);
    weights->round(reinterpret_cast<void*>(weights->out + from * weights->size),
                   reinterpret_cast<const void*>(weights->base + from * weights->size),
                   acc + (from - origin), to - from);
    from = to;
  }
}

// Selects instead of branches, so that these loops vectorise. A zero accumulator returns the
// base's own bits: -0.0 + 0.0 would be +0.0, and a weight whose edits are all reverted must be the
// base weight bit for bit.
HIEDIT_TARGET void materialize_bf16(void* to, const void* from, const float* acc, int64_t n) {
  auto* out = static_cast<uint16_t*>(to);
  auto* base = static_cast<const uint16_t*>(from);
  HIEDIT_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(base[i]) << 16;
    uint32_t a, s;
    float w;
    std::memcpy(&a, &acc[i], sizeof a);
    std::memcpy(&w, &wide, sizeof w);
    const float sum = w + acc[i];
    std::memcpy(&s, &sum, sizeof s);
    uint32_t r = (s + 0x7fffu + ((s >> 16) & 1u)) >> 16;
    r = (s & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r;
    out[i] = static_cast<uint16_t>((a << 1) == 0u ? base[i] : r);
  }
}

HIEDIT_TARGET void materialize_fp32(void* to, const void* from, const float* acc, int64_t n) {
  auto* out = static_cast<float*>(to);
  auto* base = static_cast<const float*>(from);
  HIEDIT_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const float kept = base[i], sum = kept + acc[i];
    out[i] = acc[i] == 0.0f ? kept : sum;
  }
}
