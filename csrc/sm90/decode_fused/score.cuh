// Stage 1 of the fused kernel: the block scores its own tokens into shared memory.
//
// A warp owns every kFusedWarps-th stage of the block and streams its stages through its ring; a lane scores a token
// quad for one head of four at a time. The first copies are issued as soon as the preceding kernel has finished, and
// the queries are encoded while they are in flight. Between the barriers before and after it, the loop waits only on
// the ring.
#pragma once
#include <climits>
#include <type_traits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/order.cuh"
#include "sm90/query.cuh"

namespace adamas {

// Merges the best and worst of the warp's scores of each head, and a floor, into the block's.
//
// The scores of a head are divided into groups. The floor is the smallest of the groups' maxima, so each group has at
// least one score at or above it. If there are at least as many groups as tokens needed, no token below the floor is
// selected. Fewer groups give a higher floor: a group is the scores of four lanes, two lanes, one lane, or a part of
// those of a lane. best: the maxima of kParts parts of a lane's scores.
template <int kQuads, int kParts>
__device__ __forceinline__ void merge_range(const FusedBlock& b, float (&best)[kQuads][kParts],
                                            const float (&worst)[kQuads]) {
  const int lane = b.lane;
  const int warps = min(b.s.cluster * kFusedWarps, b.plan.length / kStageTokens);
  int per_warp = 2;  // groups of a head
  while (per_warp < 8 * kParts && per_warp * warps < b.plan.need) per_warp *= 2;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float(&part)[kParts] = best[q];
#pragma unroll
    for (int n = kParts / 2; n; n /= 2)  // until as many parts are left as a lane has groups
      if (8 * n >= per_warp)
#pragma unroll
        for (int i = 0; i < n; ++i) part[i] = fmaxf(part[i], part[i + n]);
    float top = part[0], bottom = worst[q];
    float floor = INFINITY, sum = 0;
    int groups = 0;
    if (per_warp <= 8) {
      float x = top;
      if (per_warp <= 4) x = fmaxf(x, __shfl_xor_sync(kFull, x, 4));
      if (per_warp <= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, 8));
      if (x > -INFINITY) floor = x;
      if (x > -INFINITY && (lane & (8 / per_warp - 1) * 4) == 0) groups = 1, sum = x;
    } else {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (8 * i >= per_warp) break;
        top = fmaxf(top, part[i]);
        if (part[i] > -INFINITY) floor = fminf(floor, part[i]), sum += part[i], ++groups;
      }
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      groups += __shfl_xor_sync(kFull, groups, step);
      sum += __shfl_xor_sync(kFull, sum, step);
      floor = fminf(floor, __shfl_xor_sync(kFull, floor, step));
      top = fmaxf(top, __shfl_xor_sync(kFull, top, step));
      bottom = fminf(bottom, __shfl_xor_sync(kFull, bottom, step));
    }
    const int head = q * 4 + lane;
    if (lane < 4 && head < b.sets && top > -INFINITY) {
      auto& to = b.m.heads[head];
      atomicMin(&to.floor, order_key(floor));
      atomicMax(&to.best, order_key(top));
      atomicMin(&to.worst, order_key(bottom));
      atomicAdd(&to.groups, uint32_t(groups));
      atomicAdd(&to.sum, sum);
    }
  }
}

template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_own_tokens(const FusedBlock& b) {
  using Reader = StageReader<kChunks, kMode>;
  static_assert(Reader::kSteps == 2);
  const DecodeParams& p = b.p;
  const FusedShape& s = b.s;
  const FusedMemory& m = b.m;
  const RowPlan& plan = b.plan;
  const StageShape& shape = s.stage;
  const int lane = b.lane, warp = b.warp;
  StageRing<kFusedStages> ring(m.ring + warp * kFusedStages * s.stage_bytes, m.barriers + warp * kFusedStages,
                               s.stage_bytes);
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  const int stride = kFusedWarps * s.cluster * shape.tokens;  // between consecutive stages of a warp
  // The row's length is still being loaded, so these are bounded by the longest context.
  uint32_t block[kFusedStages];
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i)
    block[i] = load_stage_block(p, shape, blocks, b.first_token(warp) + i * stride, p.max_seq_len);
  QueryMemory queries{m.planes, m.bias, m.scores};
  clear_queries<kChunks, kMode>(p, queries);
  for (int i = threadIdx.x; i < b.sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
  if (int(threadIdx.x) < b.sets) {
    auto& head = m.heads[threadIdx.x];
    head.floor = head.worst = kFull, head.best = 0, head.groups = 0, head.sum = 0, head.placed = 0;
  }
  if (threadIdx.x == 0) m.search_failed() = 1;  // unless exchange 1 finds scores that differ
  b.begin();

  uint16_t raw[kChunks * 4] = {};
  if (warp < p.group) load_raw(raw, p.query, b.row, b.kv_head * p.group + warp, p.page.words);
  auto fill = [&](int slot, int token, uint32_t block) {
    if (token < plan.length) ring.fill(slot, p.page, shape, pages, token, plan.length, block);
  };
  int token = b.first_token(warp);
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i) fill(i, token + i * stride, block[i]);
  uint32_t next_block = load_stage_block(p, shape, blocks, token + kFusedStages * stride, plan.length);
  float x[kChunks * 4];
  widen(x, raw, p.query.element);
  __syncthreads();
  encode_queries<kChunks, kMode>(p, x, queries);
  QueryFragments<kChunks, kMode, kQuads> query;
  query.load(m.planes, m.bias, p.head_quads);

  const Reader reader(shape);
  // Parts of a lane's scores: those of a step, or its place in the quad as well where registers allow.
  constexpr int kPlaces = kQuads == 1 && kMode != Mode::manhattan_sum ? kQuad : 1;
  constexpr int kParts = Reader::kSteps * kPlaces;
  float best[kQuads][kParts], worst[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    worst[q] = INFINITY;
#pragma unroll
    for (int i = 0; i < kParts; ++i) best[q][i] = -INFINITY;
  }
  float* to = m.scores + warp * kStageTokens + lane % 4 * s.score_stride + lane / 4 * kQuad;
  // Summed distances have the longest code of a step: both steps' signatures at once would spill registers.
  constexpr bool kOneStep = kMode == Mode::manhattan_sum;
  auto score_stage = [&](Signatures<kChunks, kMode>(&signatures)[Reader::kSteps], uint32_t data, auto whole) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < Reader::kSteps; ++i) {
        float score[4];
        if (kOneStep) reader.load(signatures[i], data, i);
        score_quad(query, signatures[i], q, score);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool here = decltype(whole)::value || in_middle(p, plan, token + reader.token[i] + j);
          worst[q] = fminf(worst[q], here ? score[j] : INFINITY);
          score[j] = here ? score[j] : -INFINITY;
          float& top = best[q][i * kPlaces + j % kPlaces];
          top = fmaxf(top, score[j]);
        }
        if (q * 4 + lane % 4 < b.sets)
          *reinterpret_cast<float4*>(to + q * 4 * s.score_stride + i * Reader::kStep) =
              make_float4(score[0], score[1], score[2], score[3]);
      }
    }
  };
  // Stages entirely in the middle need no test per token. If the code of a stage is long, one form serves all,
  // because two would not fit the instruction cache.
  constexpr bool kTwoForms = kMode != Mode::manhattan_sum;
  const int last_whole = shape.tokens == kStageTokens ? p.num_sink_tokens + plan.middle - kStageTokens : INT_MIN;
  int slot = 0;
  uint32_t phase = 0;
  for (; token < plan.length; token += stride, to += kFusedWarps * kStageTokens) {
    ring.wait(slot, phase);
    Signatures<kChunks, kMode> signatures[Reader::kSteps];
#pragma unroll
    for (int i = 0; !kOneStep && i < Reader::kSteps; ++i) reader.load(signatures[i], ring.data(slot), i);
    if (kTwoForms && token >= p.num_sink_tokens && token <= last_whole)
      score_stage(signatures, ring.data(slot), std::true_type());
    else
      score_stage(signatures, ring.data(slot), std::false_type());
    __syncwarp();  // every lane has read the slot
    fill(slot, token + kFusedStages * stride, next_block);
    next_block = load_stage_block(p, shape, blocks, token + (kFusedStages + 1) * stride, plan.length);
    if (++slot == kFusedStages) slot = 0, phase ^= 1;
  }
  merge_range(b, best, worst);
  __syncthreads();
}

}  // namespace adamas
