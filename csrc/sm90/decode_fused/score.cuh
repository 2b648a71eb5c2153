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

// A lane's part of the stages of its warp, one after the other, and its block. Lanes past the parts of a stage have none.
class StageWalk {
 public:
  __device__ __forceinline__ explicit StageWalk(const FusedBlock& b) : p_(b.p), s_(b.s) {
    const StageShape& stage = b.s.stage;
    const bool any = b.lane < stage.parts;
    part_ = any ? b.lane * stage.part_tokens : INT_MAX;
    const int token = b.first_token() + (any ? part_ : 0);
    blocks_ = kept(row_blocks(p_, b.row));
    block_ = block_index(p_.page, token / kQuad);
    room_ = (block_ + 1) * p_.page.block_size - token;
  }

  // Whether a stage from whose start `left` tokens are left has the part.
  __device__ __forceinline__ bool has(int left) const { return left > part_; }
  // The part's entry of the block table if it has, or 0.
  __device__ __forceinline__ uint32_t block(int left) const { return has(left) ? __ldg(blocks_ + block_) : 0; }
  __device__ __forceinline__ void advance() {
    block_ += s_.stride_blocks, room_ -= s_.stride_rest;
    if (room_ <= 0) room_ += p_.page.block_size, ++block_;
  }

 private:
  const DecodeParams& p_;
  const FusedShape& s_;
  const int32_t* blocks_;
  int part_, block_, room_;  // the part's place in the stage, and tokens from there to the end of the block
};

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
  const int lane = b.lane, warp = b.warp, stride = s.stride;
  const bool first_round = round.number == 0;
  const StageRing<kFusedStages> ring(m.ring + warp * kFusedStages * s.stage_bytes, m.barriers + warp * kFusedStages,
                                     s.stage_bytes, first_round);
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  const int first = b.first_token();
  // In the first round the row's length is still being loaded, so these are bounded by the longest context.
  StageWalk walk(b);
  uint32_t block[kFusedStages];
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i) block[i] = walk.block(p.max_seq_len - first - i * stride), walk.advance();
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
      ring.fill_parts<true>(0, p.page, tile_shape, pages, tile_token, lane < parts, parts, tile_block);
      at.slot = 1;
    }
  }
  const bool one_block = shape.one_block();
  const uint8_t* planes = kept(pages + p.page.hi_offset);
  auto fill_block = [&](int slot, uint32_t block) {
    ring.fill(slot, planes + uint64_t(block) * p.page.block_stride, shape.part_bytes);
  };
  auto fill = [&](int slot, int left, uint32_t block) {
    if (left <= 0) return;
    if (one_block) return fill_block(slot, block);
    const int token = plan.length - left + lane * shape.part_tokens;
    ring.fill_apart(slot, p.page, shape, pages, token, walk.has(left), block);
  };
  constexpr int kLast = kFusedStages - 1;
  int left = plan.length - first;  // from the start of a stage to the end of the context
#pragma unroll
  for (int i = 0; i < kFusedStages; ++i)
    if (!(kSummed && i == kLast && first_round)) fill(at.after(i), left - i * stride, block[i]);
  uint32_t next_block = walk.block(left - kFusedStages * stride);
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
                  [&] { fill(0, left - kLast * stride, block[kLast]); });
    }
  }

  const Reader reader(shape);
  const bool fits = left <= (kList / kStageTokens) * stride;
  const bool guessed = kSummed && first_round && m.search.enough;
  TokenList list(m, warp, s.num_warps, round.wanted, fits, guessed ? ListState{0, m.search.low, true} : ListState{});
  int index = lane / 4 * kQuad + Scores::first();  // of the lane's first token in the stage
  // Summed distances have the longest code of a step: both steps' signatures at once would spill registers.
  constexpr bool kOneStep = kMode == Mode::manhattan_sum;
  const bool holds = Scores::set(0) == 0;  // whether the lane's scores are those of the set
  constexpr int kAtOnce = kOneStep ? 1 : Reader::kSteps;
  auto score_stage = [&](uint32_t data, auto whole) {
#pragma unroll
    for (int step = 0; step < Reader::kSteps; step += kAtOnce) {
      Signatures<kChunks, kMode> signatures[kAtOnce];
      float score[kAtOnce][Scores::kScores];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) reader.load(signatures[i], data, step + i);
      score_steps(query, signatures, score);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < Scores::kScores; ++j) {
          float& x = score[i][j];
          x = fmaxf(x, -FLT_MAX);  // a number, whatever the queries are
          if (!decltype(whole)::value) {
            const int own = plan.length - left + reader.token[step + i] + Scores::first() + j;
            const bool remains = x < round.score || (x == round.score && own < round.token);
            if (!remains || !in_middle(p, plan, own)) x = -INFINITY;
          }
        }
      list.take(score, holds, index + step * Reader::kStep, Reader::kStep);
    }
  };
  // Stages entirely in the middle need no test per token in the first round: those from whose start least_whole to
  // least_whole + whole_span tokens are left. If the code of a stage is long, one form serves all, because two would not fit
  // the instruction cache.
  constexpr bool kTwoForms = kMode != Mode::manhattan_sum;
  const bool any_whole = kTwoForms && shape.tokens == kStageTokens && first_round && plan.middle >= kStageTokens;
  const int least_whole = any_whole ? plan.length - p.num_sink_tokens - plan.middle + kStageTokens : INT_MAX;
  const uint32_t whole_span = any_whole ? plan.middle - kStageTokens : 0;
  // The loop waits for each of its chains of instructions, so it loads few parameters and branches as little as it can: it
  // counts the tokens that are left, and refills its ring behind one comparison where a stage is one block.
  const int least_fill = one_block ? kFusedStages * stride : INT_MAX;
  for (; left > 0; left -= stride, index += kStageTokens) {
    ring.wait(at.slot, at.phase);
    if (kTwoForms && uint32_t(left - least_whole) <= whole_span)
      score_stage(ring.data(at.slot), std::true_type());
    else
      score_stage(ring.data(at.slot), std::false_type());
    __syncwarp();  // every lane has read the slot
    if (left > least_fill) fill_block(at.slot, next_block);
    else if (!one_block) fill(at.slot, left - kFusedStages * stride, next_block);
    walk.advance();
    next_block = walk.block(left - (kFusedStages + 1) * stride);
    at.advance();
    list.end_stage(index);
  }
  return list.state;
}

}  // namespace adamas
