// attend: exact softmax attention over a list or a range of tokens. Per-ISA include.
//
// Tokens are processed in steps of kStep: the logits of a step for all heads of the KV head, one running
// maximum per head, then the values. Selected tokens are scattered over the pages, so the rows of the
// next step are prefetched during this one. Each row computed prefetches one row, because a core stalls
// with more than a dozen misses in flight.

constexpr int kStep = 32;

template <Element E, int D>
static void load_query(const DecodeParams& p, int row, int head, float* query) {
  alignas(64) float x[padded_size(D)] = {};
  load_vector<D>(p.query, row, head, x);
  const float scale = p.softmax_scale * (Convert<E>::bytes == 1 ? p.page.k_scale : 1.0f);
  for (int c = 0; c < D; c += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      query[c + i] = scale * (Convert<E>::interleaved ? x[c + 2 * i] : x[c + i]);
      query[c + kLanes + i] = scale * (Convert<E>::interleaved ? x[c + 2 * i + 1] : x[c + kLanes + i]);
    }
}

template <Element E, int D>
static void store_output(const DecodeParams& p, int row, int head, const Partial& partial) {
  const int64_t at = row * p.output.token_stride + head * p.output.head_stride;
  float sum = partial.sum;
  if (p.lse)
    p.lse[int64_t(row) * p.num_query_heads + head] = sum > 0 ? partial.max + __builtin_logf(sum) : -__builtin_inff();
  if (p.sinks && sum > 0) sum += __builtin_expf(p.sinks[head] - partial.max);  // at most infinite, and the output 0
  const float norm = sum > 0 ? (Convert<E>::bytes == 1 ? p.page.v_scale : 1.0f) / sum : 0.0f;
  if (E == Element::bf16 && p.output.element == Element::bf16) {  // the usual case, vectorised
    uint16_t* to = (uint16_t*)p.output.data + at;
    for (int c = 0; c < D; c += 2 * kLanes) {
      const vu even = round_bf16(load<vf>(partial.acc + c) * norm);
      const vu odd = round_bf16(load<vf>(partial.acc + c + kLanes) * norm);
      const vu pairs = odd | even >> 16;
      __builtin_memcpy(to + c, &pairs, D - c < 2 * kLanes ? 2 * kLanes : 4 * kLanes);  // a row may end with half of them
    }
    return;
  }
  for (int c = 0; c < D; c += 2 * kLanes)
    for (int i = 0; i < 2 * kLanes && c + i < D; ++i) {
      const int from = !Convert<E>::interleaved ? i : i % 2 ? kLanes + i / 2 : i / 2;
      store_scalar(p.output.data, at + c + i, p.output.element, partial.acc[c + from] * norm);
    }
}

// Vectors per head that are accumulated in registers at a time: an even divisor of `vectors`.
constexpr int columns(int vectors, int heads) {
  const int registers = kLanes == 16 ? 24 : 12;
  int best = 2;
  for (int c = 2; c <= vectors; c += 2)
    if (vectors % c == 0 && c * heads <= registers) best = c;
  return best;
}

template <Element E, int D>
static inline void prefetch_row(const uint8_t* row) {
  for (int line = 0; line < D * Convert<E>::bytes; line += kLine) __builtin_prefetch(row + line);
}

// One step for H heads at once, so that each K and V element is converted once. Prefetches the rows `next`.
template <Element E, int D, int H>
static inline void attend_step(const uint8_t* const* rows, int n, const uint8_t* const* next,
                               int64_t v_offset, const float* queries, float cap, Partial* partials) {
  alignas(64) float weight[H][kStep];
  for (int group = 0; group < kStep; group += kLanes) {
    vf sums[H][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* k = rows[group + i];
      prefetch_row<E, D>(next[group + i]);
      vf s[H];
#pragma GCC unroll 8
      for (int c = 0; c < D; c += 2 * kLanes) {
        vf a, b;
        load_pair<E, D>(k, c, a, b);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          const float* query = queries + h * padded_size(D) + c;
          const vf q0 = load<vf>(query), q1 = load<vf>(query + kLanes);
          s[h] = c ? s[h] + a * q0 : a * q0;
          s[h] += b * q1;
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) sums[h][i] = s[h];
    }
    for (int h = 0; h < H; ++h) {
      const vf logits = transpose_sum(sums[h]);
      store(weight[h] + group, cap > 0 ? soft_cap(logits, cap) : logits);
    }
  }

  float decay[H];
  for (int h = 0; h < H; ++h) {
    for (int i = n; i < kStep; ++i) weight[h][i] = -__builtin_inff();
    vf top = splat(partials[h].max);
    for (int group = 0; group < kStep; group += kLanes) top = max(top, load<vf>(weight[h] + group));
    const float new_max = hmax(top);
    const float safe_max = new_max == -__builtin_inff() ? 0.0f : new_max;
    vf sum = {};
    for (int group = 0; group < kStep; group += kLanes) {
      const vf w = exp_negative(load<vf>(weight[h] + group) - safe_max);
      store(weight[h] + group, w);
      sum += w;
    }
    decay[h] = exp_negative(splat(partials[h].max - safe_max))[0];
    partials[h].sum = partials[h].sum * decay[h] + hsum(sum);
    partials[h].max = new_max;
  }

  constexpr int kVectors = (D + 2 * kLanes - 1) / (2 * kLanes) * 2;
  constexpr int kColumns = columns(kVectors, H);
#pragma GCC unroll 1
  for (int column = 0; column < kVectors; column += kColumns) {
    vf acc[H][kColumns];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[h][c] = load<vf>(partials[h].acc + (column + c) * kLanes) * decay[h];
    for (int i = 0; i < n; ++i) {
      const uint8_t* v = rows[i] + v_offset;
      if (column == 0) prefetch_row<E, D>(next[i] + v_offset);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; c += 2) {
        vf a, b;
        load_pair<E, D>(v, (column + c) * kLanes, a, b);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          acc[h][c] += a * weight[h][i];
          acc[h][c + 1] += b * weight[h][i];
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) store(partials[h].acc + (column + c) * kLanes, acc[h][c]);
  }
}

template <Element E, int D>
static void attend_tokens(const DecodeParams& p, int row, int kv_head, const float* queries, int heads,
                          const int32_t* tokens, int first, int count, Partial* partials) {
  constexpr int kRow = D * Convert<E>::bytes;
  const Page& page = p.page;
  const int32_t* blocks = p.blocks(row);
  const int shift = (page.block_size & (page.block_size - 1)) == 0 ? __builtin_ctz(page.block_size) : -1;
  const uint8_t* rows[2][kStep];

  auto locate = [&](int start, const uint8_t** to) {
    const int n = count - start < kStep ? count - start : kStep;
    for (int i = 0; i < n; ++i) {
      const int token = tokens ? tokens[start + i] : first + start + i;
      const int block = shift >= 0 ? token >> shift : token / page.block_size;
      const int offset = token - block * page.block_size;
      to[i] = page.run(blocks[block], kv_head) + offset * kRow;
    }
    for (int i = n; i < kStep; ++i) to[i] = to[0];  // read, but their weight is 0
  };

  for (int h = 0; h < heads; ++h) {
    partials[h].max = -__builtin_inff();
    partials[h].sum = 0;
    for (int i = 0; i < padded_size(D); ++i) partials[h].acc[i] = 0;
  }
  if (count > 0) {
    locate(0, rows[0]);
    for (int i = 0; i < kStep; ++i) prefetch_row<E, D>(rows[0][i]);
    for (int i = 0; i < kStep; ++i) prefetch_row<E, D>(rows[0][i] + page.v_offset);
  }
  for (int start = 0, turn = 0; start < count; start += kStep, turn ^= 1) {
    const uint8_t *const *now = rows[turn], *const *next = now;
    if (start + kStep < count) locate(start + kStep, rows[turn ^ 1]), next = rows[turn ^ 1];
    const int n = count - start < kStep ? count - start : kStep;
    int h = 0;
    for (; h + 4 <= heads; h += 4)
      attend_step<E, D, 4>(now, n, next, page.v_offset, queries + h * padded_size(D), p.soft_cap, partials + h);
    if (h + 3 == heads) {
      attend_step<E, D, 3>(now, n, next, page.v_offset, queries + h * padded_size(D), p.soft_cap, partials + h);
    } else {
      for (; h < heads; ++h)
        attend_step<E, D, 1>(now, n, next, page.v_offset, queries + h * padded_size(D), p.soft_cap, partials + h);
    }
  }
}
