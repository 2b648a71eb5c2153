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
#include "sm90/maximum.cuh"
#include "sm90/order.cuh"
#include "sm90/query.cuh"

namespace adamas {

// Merges the best of the warp's scores of each head, and a floor, into the block's range.
//
// The scores of a head are divided into groups. The floor is the smallest of the groups' maxima, so each group has at
// least one score at or above it. If there are at least as many groups as tokens needed, no token below the floor is
// selected. Fewer groups give a higher floor: a group is the scores of several lanes, one lane, or a part of those of a
// lane. best: the maxima of kParts parts of a lane's scores.
template <class Scores, int kQuads, int kParts>
__device__ __forceinline__ void merge_range(const FusedBlock& b, float (&best)[kQuads][kParts]) {
  constexpr int kLanes = Scores::kSetLanes, kStride = Scores::kSetStride;
  const int lane = b.lane;
  const int warps = min(b.s.cluster * kFusedWarps, b.plan.length / kStageTokens);
  int per_warp = 2;  // groups of a head
  while (per_warp < kLanes * kParts && per_warp * warps < b.plan.need) per_warp *= 2;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float(&part)[kParts] = best[q];
#pragma unroll
    for (int n = kParts / 2; n; n /= 2)  // until as many parts are left as a lane has groups
      if (kLanes * n >= per_warp)
#pragma unroll
        for (int i = 0; i < n; ++i) part[i] = fmaxf(part[i], part[i + n]);
    float top = part[0];
    float floor = INFINITY;
    int groups = 0;
    if (per_warp <= kLanes) {
      float x = top;
#pragma unroll
      for (int n = kLanes / 2, step = kStride; n >= 2; n /= 2, step *= 2)
        if (n >= per_warp) x = fmaxf(x, __shfl_xor_sync(kFull, x, step));
      if (x > -INFINITY) floor = x;
      if (x > -INFINITY && (lane & (kLanes / per_warp - 1) * kStride) == 0) groups = 1;
    } else {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (kLanes * i >= per_warp) break;
        top = fmaxf(top, part[i]);
        if (part[i] > -INFINITY) floor = fminf(floor, part[i]), ++groups;
      }
    }
#pragma unroll
    for (int step = kStride; step < 32; step *= 2) {
      groups += __shfl_xor_sync(kFull, groups, step);
      floor = fminf(floor, __shfl_xor_sync(kFull, floor, step));
      top = fmaxf(top, __shfl_xor_sync(kFull, top, step));
    }
    const int head = q * kStride + lane;
    if (lane < kStride && head < b.sets && top > -INFINITY) {
      FusedRange& to = b.m.heads[head].range;
      atomicMin(&to.floor, order_key(floor));
      atomicMax(&to.best, order_key(top));
      atomicAdd(&to.groups, uint32_t(groups));
      atomicMax(&to.high_floor, order_key(floor));
    }
  }
}

// The log-sum-exp of every head's logits over the sample (maximum.cuh), which each block of the cluster computes. The
// warp has tiles kTilesPerWarp * warp and following of the `tiles` of the sample; `data` is its stage of them. Places past
// the context occur only in a sample of all tiles, which then follow each other.
constexpr int kTilesPerWarp = kStageTokens / kTile;
static_assert(kTilesPerWarp * kFusedWarps == kSampleTiles);

template <int kChunks, int kQuads, class Fill>
__device__ __forceinline__ void weigh_heads(const FusedBlock& b, QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                            const StageShape& shape, uint32_t data, int tiles, Fill next) {
  using Reader = StageReader<kChunks, Mode::dot_max>;
  const Reader reader(shape);
  const int lane = b.lane;
  float logit[kQuads][Reader::kSteps][4];
#pragma unroll
  for (int i = 0; i < Reader::kSteps; ++i) {
    const int number = b.warp * kTilesPerWarp + reader.token[i] / kTile;
    const int token = sum_tile(min(number, tiles - 1), tiles) * kTile + reader.token[i] % kTile;
    const int here = number < tiles ? b.plan.length - token : 0;
    Signatures<kChunks, Mode::dot_max> signatures;
    reader.load(signatures, data, i);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      logit_quad(query, signatures, q, logit[q][i]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j >= here) logit[q][i][j] = -INFINITY;
    }
  }
  __syncwarp();  // every lane has read the slot
  next();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < Reader::kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) top = max(top, order_key(logit[q][i][j]));
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = max(top, __shfl_xor_sync(kFull, top, step));
    if (lane < 4) atomicMax(b.m.tops + q * 4 + lane, top);
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float top = from_order_key(b.m.tops[q * 4 + lane % 4]);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < Reader::kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += logit[q][i][j] > -INFINITY ? sum_term(logit[q][i][j], top) : 0;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFull, sum, step);
    if (lane < 4) atomicAdd(b.m.sums + q * 4 + lane, sum);
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int head = q * 4 + lane % 4;
    if (head < b.p.group) query.weight[q].log_sum = log_sum(from_order_key(b.m.tops[head]), b.m.sums[head]);
  }
}

template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_own_tokens(const FusedBlock& b) {
  using Reader = StageReader<kChunks, kMode>;
  using Scores = SetScores<kMode, kQuads>;
  constexpr int kSetQuads = Scores::kSetQuads;
  constexpr bool kSummed = kMode == Mode::dot_max;  // the first slot of the ring holds the sample first
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
  // The warp's tiles of the sample; this lane's one.
  const StageShape tile_shape = StageShape::of_tiles(p.page);
  const int tiles = (plan.length + kTile - 1) / kTile;
  const int tile_token = sum_tile(min(warp * kTilesPerWarp + lane % kTilesPerWarp, tiles - 1), tiles) * kTile;
  uint32_t tile_block = 0;
  if (kSummed) tile_block = __ldg(blocks + block_index(p.page, tile_token / kQuad));
  QueryMemory queries{m.planes, m.bias, m.weights, m.scores};
  clear_queries<kChunks, kMode>(p, queries);
  for (int i = threadIdx.x; i < b.sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
  if (kSummed && threadIdx.x < 4 * kMaxHeadQuads) m.tops[threadIdx.x] = m.sums[threadIdx.x] = 0;
  if (int(threadIdx.x) < b.sets) {
    auto& head = m.heads[threadIdx.x];
    head.range = {kFull, 0, 0, 0};
    head.placed = 0;
  }
  if (threadIdx.x == 0) m.search_failed() = 1;  // unless exchange 1 finds scores that differ
  b.begin();

  uint16_t raw[kChunks * 4] = {};
  if (warp < p.group) load_raw(raw, p.query, b.row, b.kv_head * p.group + warp, p.page.words);
  auto fill = [&](int slot, int token, uint32_t block) {
    if (token < plan.length) ring.fill(slot, p.page, shape, pages, token, plan.length, block);
  };
  int token = b.first_token(warp);
  constexpr int kFirst = kSummed ? 1 : 0;  // slot of the first own stage
  if (kSummed) {
    const int parts = min(max(min(tiles, kSampleTiles) - warp * kTilesPerWarp, 0), kTilesPerWarp);
    ring.fill_parts(0, p.page, tile_shape, pages, tile_token, parts, tile_block);
  }
#pragma unroll
  for (int i = 0; i < kFusedStages - kFirst; ++i) fill(kFirst + i, token + i * stride, block[i]);
  uint32_t next_block = load_stage_block(p, shape, blocks, token + kFusedStages * stride, plan.length);
  float x[kChunks * 4];
  widen(x, raw, p.query.element);
  __syncthreads();
  encode_queries<kChunks, kMode>(p, x, queries);
  QueryFragments<kChunks, kMode, kQuads> query;
  query.load(m.planes, m.bias, p.head_quads);
  if constexpr (kSummed) {
    query.load_weights(m.weights, p.head_quads);
    ring.wait(0, 0);
    const int last = kFusedStages - 1;
    weigh_heads(b, query, tile_shape, ring.data(0), min(tiles, kSampleTiles),
                [&] { fill(0, token + last * stride, block[last]); });
  }

  const Reader reader(shape);
  constexpr int kParts = Reader::kSteps;  // parts of a lane's scores: those of a step
  float best[kSetQuads][kParts];
#pragma unroll
  for (int q = 0; q < kSetQuads; ++q) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) best[q][i] = -INFINITY;
  }
  float* to = m.scores + warp * kStageTokens + Scores::set(0) * s.score_stride + lane / 4 * kQuad + Scores::first();
  // Summed distances have the longest code of a step: both steps' signatures at once would spill registers.
  constexpr bool kOneStep = kMode == Mode::manhattan_sum;
  auto score_stage = [&](Signatures<kChunks, kMode>(&signatures)[Reader::kSteps], uint32_t data, auto whole) {
#pragma unroll
    for (int q = 0; q < kSetQuads; ++q) {
#pragma unroll
      for (int i = 0; i < Reader::kSteps; ++i) {
        float score[Scores::kScores];
        if (kOneStep) reader.load(signatures[i], data, i);
        score_set(query, signatures[i], q, score);
#pragma unroll
        for (int j = 0; j < Scores::kScores; ++j) {
          const bool here =
              decltype(whole)::value || in_middle(p, plan, token + reader.token[i] + Scores::first() + j);
          score[j] = here ? score[j] : -INFINITY;
          best[q][i] = fmaxf(best[q][i], score[j]);
        }
        float* at = to + q * 4 * s.score_stride + i * Reader::kStep;
        if constexpr (Scores::kOne) *at = score[0];
        else if (Scores::set(q) < b.sets)
          *reinterpret_cast<float4*>(at) = make_float4(score[0], score[1], score[2], score[3]);
      }
    }
  };
  // Stages entirely in the middle need no test per token. If the code of a stage is long, one form serves all,
  // because two would not fit the instruction cache.
  constexpr bool kTwoForms = kMode != Mode::manhattan_sum;
  const int last_whole = shape.tokens == kStageTokens ? p.num_sink_tokens + plan.middle - kStageTokens : INT_MIN;
  int slot = kFirst;
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
  merge_range<Scores>(b, best);
  __syncthreads();
}

}  // namespace adamas
