// attend: exact softmax attention over a list or a range of tokens. Per-ISA include.
//
// Tokens go through in steps of kStep: logits of a step for all heads of the KV head, one running
// maximum per head, then the values. The rows of the next step are prefetched while this one is
// computed, because selected tokens lie scattered over the pages.

constexpr int kStep = 32;

template <Element E, int D>
static void load_query(const DecodeParams& p, int row, int head, float* query) {
  alignas(64) float x[D];
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
  const float norm =
      partial.sum > 0 ? (Convert<E>::bytes == 1 ? p.page.v_scale : 1.0f) / partial.sum : 0.0f;
  for (int c = 0; c < D; c += 2 * kLanes)
    for (int i = 0; i < 2 * kLanes; ++i) {
      const int from = !Convert<E>::interleaved ? i : i % 2 ? kLanes + i / 2 : i / 2;
      store_scalar(p.output.data, at + c + i, p.output.element, partial.acc[c + from] * norm);
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
      for (int line = 0; line < kRow; line += 64) {
        __builtin_prefetch(to[i] + line);
        __builtin_prefetch(to[i] + page.v_offset + line);
      }
    }
  };

  for (int h = 0; h < heads; ++h) {
    partials[h].max = -__builtin_inff();
    partials[h].sum = 0;
    for (int i = 0; i < D; ++i) partials[h].acc[i] = 0;
  }
  if (count > 0) locate(0, rows[0]);
  for (int start = 0, turn = 0; start < count; start += kStep, turn ^= 1) {
    if (start + kStep < count) locate(start + kStep, rows[turn ^ 1]);
    const uint8_t** at = rows[turn];
    const int n = count - start < kStep ? count - start : kStep;
    for (int i = n; i < kStep; ++i) at[i] = at[0];  // masked below

    for (int h = 0; h < heads; ++h) {
      const float* q = queries + h * D;
      alignas(64) float weight[kStep];
      vf top = splat(-__builtin_inff());
      for (int group = 0; group < kStep; group += kLanes) {
        vf sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const uint8_t* k = at[group + i];
          vf s = {};
#pragma GCC unroll 8
          for (int c = 0; c < D; c += 2 * kLanes) {
            vf a, b;
            Convert<E>::load2(k + c * Convert<E>::bytes, a, b);
            s += a * load<vf>(q + c);
            s += b * load<vf>(q + c + kLanes);
          }
          sums[i] = s;
        }
        vf logits = transpose_sum(sums);
        for (int i = 0; i < kLanes; ++i)
          if (group + i >= n) logits[i] = -__builtin_inff();
        store(weight + group, logits);
        top = max(top, logits);
      }
      Partial& state = partials[h];
      const float new_max = hmax(max(top, splat(state.max)));
      const float safe_max = new_max == -__builtin_inff() ? 0.0f : new_max;
      vf sum = {};
      for (int group = 0; group < kStep; group += kLanes) {
        const vf w = exp_negative(load<vf>(weight + group) - safe_max);
        store(weight + group, w);
        sum += w;
      }
      const float decay = exp_negative(splat(state.max - safe_max))[0];
      state.sum = state.sum * decay + hsum(sum);
      state.max = new_max;

      vf acc[D / kLanes];
#pragma GCC unroll 64
      for (int c = 0; c < D / kLanes; ++c) acc[c] = load<vf>(state.acc + c * kLanes) * decay;
      for (int i = 0; i < n; ++i) {
        const uint8_t* v = at[i] + page.v_offset;
        const float w = weight[i];
#pragma GCC unroll 32
        for (int c = 0; c < D / kLanes; c += 2) {
          vf a, b;
          Convert<E>::load2(v + c * kLanes * Convert<E>::bytes, a, b);
          acc[c] += a * w;
          acc[c + 1] += b * w;
        }
      }
#pragma GCC unroll 64
      for (int c = 0; c < D / kLanes; ++c) store(state.acc + c * kLanes, acc[c]);
    }
  }
}
