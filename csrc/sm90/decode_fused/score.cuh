// Stage 1 of the fused kernel: the block scores its own tokens, and every warp lists those that may be selected.
//
// A warp owns every num_warps-th stage of the block and streams its stages through its ring; a lane scores a token
// quad for one head of four at a time. The first copies are issued as soon as the preceding kernel has finished, and
// the queries are encoded while they are in flight. The loop waits only on the ring.
#pragma once
#include <climits>
#include <type_traits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/decode_fused/range.cuh"
#include "sm90/maximum.cuh"
#include "sm90/query.cuh"

namespace adamas {

// A round selects `wanted` of the tokens that rank below (score, token): the best ones that are left.
struct Round {
  int number, wanted;
  float score;
  int token;
};

// The place in a warp's ring; stages follow each other from round to round.
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ int after(int stages) const {
    const int at = slot + stages;
    return at < kFusedStages ? at : at - kFusedStages;
  }
  __device__ __forceinline__ void advance() {
    if (++slot == kFusedStages) slot = 0, phase ^= 1;
  }
};

// The log-sum-exp of every head's logits over the sample (maximum.cuh), and the range that the sample's scores suggest
// (range.cuh). Each block of the cluster computes both. The warp has tiles kTilesPerWarp * warp and following of the `tiles`
// of the sample; `data` is its stage of them. Places past the context occur only in a sample of all tiles, which then follow
// each other.
constexpr int kTilesPerWarp = kStageTokens / kTile;
static_assert(kTilesPerWarp * kLeastWarps == kSampleTiles);

template <int kChunks, int kQuads, class Fill>
__device__ __forceinline__ void weigh_heads(const FusedBlock& b, QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                            const StageShape& shape, uint32_t data, int tiles, int wanted, Fill next) {
  using Reader = StageReader<kChunks, Mode::dot_max>;
  const Reader reader(shape);
  const int lane = b.lane;
  float logit[Reader::kSteps][kQuads][4];
#pragma unroll
  for (int i = 0; i < Reader::kSteps; ++i) {
    const int number = b.warp * kTilesPerWarp + reader.token[i] / kTile;
    const int token = sum_tile(min(number, tiles - 1), tiles) * kTile + reader.token[i] % kTile;
    const int here = number < tiles ? b.plan.length - token : 0;
    Signatures<kChunks, Mode::dot_max> signatures;
    reader.load(signatures, data, i);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      logit_quad(query, signatures, q, logit[i][q]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j >= here) logit[i][q][j] = -INFINITY;
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
      for (int j = 0; j < 4; ++j) top = max(top, order_key(logit[i][q][j]));
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
      for (int j = 0; j < 4; ++j) sum += logit[i][q][j] > -INFINITY ? sum_term(logit[i][q][j], top) : 0;
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
#pragma unroll
  for (int i = 0; i < Reader::kSteps; ++i) {
    const float score = weighed_maximum(query, logit[i]);
    if (score > -INFINITY) count_sampled(b, score);
  }
  if (b.warp == 0 && lane < b.p.group)  // for the next round
    b.m.weights[lane].log_sum = log_sum(from_order_key(b.m.tops[lane]), b.m.sums[lane]);
  __syncthreads();
  if (b.warp == 0) guess_range(b, wanted);
  __syncthreads();
}

// Prepares the block's search of a round; the caller synchronises before the first score.
__device__ __forceinline__ void reset_round(const FusedBlock& b) {
  if (threadIdx.x < kEdgeWords) b.m.counts[threadIdx.x] = 0;
  if (int(threadIdx.x) < b.s.num_warps) b.m.posts[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    b.m.search.range = {0, kFull, 0, 0, 0};
    b.m.search.placed = 0;
  }
}

// Returns the state of the warp's list.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ ListState list_own_tokens(const FusedBlock& b, const Round& round, RingPlace& at) {
  using Reader = StageReader<kChunks, kMode>;
  using Scores = SetScores<kMode, kQuads>;
  constexpr bool kSummed = kMode == Mode::dot_max;  // the first slot of the ring holds the sample first
  static_assert(Reader::kSteps == 2);
  const DecodeParams& p = b.p;
  const FusedShape& s = b.s;
  const FusedMemory& m = b.m;
  const RowPlan& plan = b.plan;
  const StageShape& shape = s.stage;
  const int lane = b.lane, warp = b.warp, stride = b.stride();
  const bool first_round = round.number == 0;
  const StageRing<kFusedStages> ring(m.ring + warp * kFusedStages * s.stage_bytes, m.barriers + warp * kFusedStages,
                                     s.stage_bytes, first_round);
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  int token = b.first_token();
  // In the first round the row's length is still being loaded, so these are bounded by the longest context.
  uint32_t block[kFusedStages];
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i)
    block[i] = load_stage_block(p, shape, blocks, token + i * stride, p.max_seq_len);
  // The warp's tiles of the sample, if it has any; this lane's one.
  const StageShape tile_shape = StageShape::of_tiles(p.page);
  const int tiles = (plan.length + kTile - 1) / kTile, sampled = min(tiles, kSampleTiles);
  const int tile_token = sum_tile(min(warp * kTilesPerWarp + lane % kTilesPerWarp, sampled - 1), tiles) * kTile;
  const QueryMemory queries{m.planes, m.bias, m.weights, m.scores};
  if (first_round) reset_round(b);
  uint32_t tile_block = 0;
  uint16_t raw[kChunks * 4] = {};
  if (first_round) {
    if (kSummed) tile_block = __ldg(blocks + block_index(p.page, tile_token / kQuad));
    clear_queries<kChunks, kMode>(p, queries);
    if (kSummed && threadIdx.x < 4 * kMaxHeadQuads) m.tops[threadIdx.x] = m.sums[threadIdx.x] = 0;
    if (kSummed && threadIdx.x < kSampledBins) m.sampled[threadIdx.x] = 0;
    b.begin();
    if (warp < p.group) load_raw(raw, p.query, b.row, b.kv_head * p.group + warp, p.page.words);
    if (kSummed) {
      const int parts = min(max(sampled - warp * kTilesPerWarp, 0), kTilesPerWarp);
      ring.fill_parts<true>(0, p.page, tile_shape, pages, tile_token, parts, tile_block);
      at.slot = 1;
    }
  }
  auto fill = [&](int slot, int token, uint32_t block) {
    if (token < plan.length) ring.fill<true>(slot, p.page, shape, pages, token, plan.length, block);
  };
  constexpr int kLast = kFusedStages - 1;
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i)
    if (!(kSummed && i == kLast && first_round)) fill(at.after(i), token + i * stride, block[i]);
  uint32_t next_block = load_stage_block(p, shape, blocks, token + kFusedStages * stride, plan.length);
  if (first_round) {
    float x[kChunks * 4];
    widen(x, raw, p.query.element);
    __syncthreads();
    encode_queries<kChunks, kMode>(p, x, queries);
  }
  QueryFragments<kChunks, kMode, kQuads> query;
  query.load(m.planes, m.bias, p.head_quads);
  if constexpr (kSummed) {
    query.load_weights(m.weights, p.head_quads);
    if (first_round) {
      ring.wait(0, 0);
      weigh_heads(b, query, tile_shape, ring.data(0), sampled, round.wanted,
                  [&] { fill(0, token + kLast * stride, block[kLast]); });
    }
  }

  const Reader reader(shape);
  const bool fits = token + (kList / kStageTokens) * stride >= plan.length;
  const bool guessed = kSummed && first_round && m.search.enough;
  TokenList list(m, warp, s.num_warps, round.wanted, fits, guessed ? ListState{0, m.search.low, true} : ListState{});
  int index = lane / 4 * kQuad + Scores::first();  // of the lane's first token in the stage
  // Summed distances have the longest code of a step: both steps' signatures at once would spill registers.
  constexpr bool kOneStep = kMode == Mode::manhattan_sum;
  const bool holds = Scores::set(0) == 0;  // whether the lane's scores are those of the set
  auto score_stage = [&](Signatures<kChunks, kMode>(&signatures)[Reader::kSteps], uint32_t data, auto whole) {
#pragma unroll
    for (int i = 0; i < Reader::kSteps; ++i) {
      float score[Scores::kScores];
      if (kOneStep) reader.load(signatures[i], data, i);
      score_set(query, signatures[i], 0, score);
#pragma unroll
      for (int j = 0; j < Scores::kScores; ++j) {
        score[j] = fmaxf(score[j], -FLT_MAX);  // a number, whatever the queries are
        if (!decltype(whole)::value) {
          const int own = token + reader.token[i] + Scores::first() + j;
          const bool left = score[j] < round.score || (score[j] == round.score && own < round.token);
          if (!left || !in_middle(p, plan, own)) score[j] = -INFINITY;
        }
      }
      list.take(score, holds, index + i * Reader::kStep);
    }
  };
  // Stages entirely in the middle need no test per token in the first round. If the code of a stage is long, one form
  // serves all, because two would not fit the instruction cache.
  constexpr bool kTwoForms = kMode != Mode::manhattan_sum;
  const int last_whole = shape.tokens == kStageTokens && first_round
                             ? p.num_sink_tokens + plan.middle - kStageTokens : INT_MIN;
  for (; token < plan.length; token += stride, index += kStageTokens) {
    ring.wait(at.slot, at.phase);
    Signatures<kChunks, kMode> signatures[Reader::kSteps];
#pragma unroll
    for (int i = 0; !kOneStep && i < Reader::kSteps; ++i) reader.load(signatures[i], ring.data(at.slot), i);
    if (kTwoForms && token >= p.num_sink_tokens && token <= last_whole)
      score_stage(signatures, ring.data(at.slot), std::true_type());
    else
      score_stage(signatures, ring.data(at.slot), std::false_type());
    __syncwarp();  // every lane has read the slot
    if (const int next = token + kFusedStages * stride; next < plan.length)
      ring.fill(at.slot, p.page, shape, pages, next, plan.length, next_block);
    next_block = load_stage_block(p, shape, blocks, token + (kFusedStages + 1) * stride, plan.length);
    at.advance();
    list.end_stage(index / kStageTokens + 1);
  }
  return list.state;
}

}  // namespace adamas
