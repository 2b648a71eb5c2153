// Selection of the k best tokens without candidates, for when the pivot left too few of them or more than fit. The
// block computes every score of the row once per pass of a radix selection and once more at the end. This fallback is
// slow, but exact for any distribution of scores.
#pragma once
#include "sm90/bitmap.cuh"
#include "sm90/decode_split/scan_quads.cuh"
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"
#include "sm90/rows.cuh"

namespace adamas {

// A warp takes every (kThreads / 32)-th run of 32 tokens. `head`: the token set's number in its KV head. Not inlined,
// because it is rare and would raise the register count of the kernel.
template <int kThreads, int kChunks, Mode kMode>
__device__ __noinline__ void select_from_scan(const DecodeParams& p, int row, int kv_head, int head,
                                              const RowPlan& plan, uint32_t* bins, uint32_t* bitmap) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t group = int64_t(row) * p.page.num_kv_heads + kv_head;
  constexpr int kQuads = kMode == Mode::dot_max ? kMaxHeadQuads : 1;
  using Scores = SetScores<kMode, kQuads>;
  const int quad = head / 4;
  constexpr int kQuadWords = query_planes(kMode) * kChunks * 32;
  QueryFragments<kChunks, kMode, kQuads> query;
  query.load(p.work.planes + (group * p.head_quads + quad) * kQuadWords,
             p.work.bias + (group * p.head_quads + quad) * 4,
             kMode == Mode::manhattan_sum || kMode == Mode::dot_max ? p.head_quads : 1);
  if constexpr (kMode == Mode::dot_max) query.load_weights(p.work.weights + group * p.head_quads * 4, p.head_quads);
  const int bits = token_bits(plan.length);
  const int all = (plan.length + 31) / 32;
  const int steps = (all - warp + kWarps - 1) / kWarps;
  auto each = [&](auto visit) {
    scan_quads<kChunks, kMode>(
        p.page, kv_head, row_blocks(p, row), plan.length, max(steps, 0),
        [&](int step) { return (warp + step * kWarps) * 8 + lane / 4; }, [] {}, [] {},
        [&](int, int token, const Signatures<kChunks, kMode>& signatures) {
          float score[Scores::kScores];
          score_set(query, signatures, 0, score);
          if (Scores::set(quad) != head) return;
          token += Scores::first();
#pragma unroll
          for (int i = 0; i < Scores::kScores; ++i)
            if (in_middle(p, plan, token + i)) visit(rank_key(order_key(score[i]), token + i, bits));
        });
    __syncwarp();
  };
  const uint64_t best = block_threshold<kThreads>(bins, 32 + bits, plan.need, each);
  const uint64_t mask = (1ull << bits) - 1;
  each([&](uint64_t v) {
    if (v >= best) set_bit(bitmap, uint32_t(v & mask));
  });
}

template <int kThreads, int kChunks>
__device__ __forceinline__ void select_from_scan(const DecodeParams& p, int row, int kv_head, int head,
                                                 const RowPlan& plan, uint32_t* bins, uint32_t* bitmap) {
  switch (p.mode) {
    case Mode::dot:
      return select_from_scan<kThreads, kChunks, Mode::dot>(p, row, kv_head, head, plan, bins, bitmap);
    case Mode::manhattan:
      return select_from_scan<kThreads, kChunks, Mode::manhattan>(p, row, kv_head, head, plan, bins, bitmap);
    case Mode::dot_max:
      return select_from_scan<kThreads, kChunks, Mode::dot_max>(p, row, kv_head, 0, plan, bins, bitmap);
    default:
      return select_from_scan<kThreads, kChunks, Mode::manhattan_sum>(p, row, kv_head, 0, plan, bins, bitmap);
  }
}

}  // namespace adamas
