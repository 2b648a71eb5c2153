// Stage 1 of the fused kernel: the block scores its own tokens into shared memory.
//
// A warp owns every kFusedWarps-th stage of the block and streams its stages through its ring; a lane scores a token
// quad for one head of four at a time. The first copies are issued as soon as the preceding kernel has finished, and
// the queries are encoded while they are in flight. Between the barriers before and after it, the loop waits only on
// the ring.
#pragma once
#include <climits>
#include <type_traits>

#include "sm90/bins.cuh"
#include "sm90/decode_fused/block.cuh"
#include "sm90/maximum.cuh"
#include "sm90/order.cuh"
#include "sm90/query.cuh"

namespace adamas {

// -- the sample --
//
// Every block of the cluster scores the same tiles of the context, spread over it, before its own tokens (maximum.cuh
// says which). Their scores give the bins of exchange 1, and for dot_max each head's log-sum-exp. All blocks compute the
// same values, so they need not exchange them.

// Mean and deviation follow from these.
struct LaneSample {
  float sum = 0, squares = 0;
  int count = 0;

  __device__ __forceinline__ void add(float x, bool here) {
    sum += here ? x : 0.0f;
    squares += here ? x * x : 0.0f;
    count += here;
  }

  // Stores the sum over the lanes that are kStride apart, for set lane % kStride of `sets`.
  template <int kStride>
  __device__ __forceinline__ void store(ScoreSample* to, int sets) {
#pragma unroll
    for (int step = kStride; step < 32; step *= 2) {
      sum += __shfl_xor_sync(kFull, sum, step);
      squares += __shfl_xor_sync(kFull, squares, step);
      count += __shfl_xor_sync(kFull, count, step);
    }
    const int set = threadIdx.x % 32;
    if (set < min(kStride, sets)) to[set] = {sum, squares, uint32_t(count)};
  }
};

constexpr int kTilesPerWarp = kStageTokens / kTile;
static_assert(kTilesPerWarp * kFusedWarps == kSampleTiles);

// The warp's tiles of the sample: numbers kTilesPerWarp * warp and following, if the context has so many.
struct SampleTiles {
  StageShape shape;
  int context, sampled, first;  // tiles of the context and of the sample, and the warp's first number

  __device__ SampleTiles(const Page& page, int length, int warp)
      : shape(StageShape::of_tiles(page)), context((length + kTile - 1) / kTile), sampled(min(context, kSampleTiles)),
        first(warp * kTilesPerWarp) {}
  __device__ __forceinline__ int parts() const { return min(max(sampled - first, 0), kTilesPerWarp); }
  // The token at a place of the warp's stage; places past the last tile stand for its tokens.
  __device__ __forceinline__ int token(int place) const {
    return sum_tile(min(first + place / kTile, sampled - 1), context) * kTile + place % kTile;
  }
  __device__ __forceinline__ bool has(int place) const { return first + place / kTile < sampled; }
};

// Subtracts each head's log-sum-exp from the logits of the sample; the query fragments keep it.
template <int kChunks, int kQuads, int kSteps>
__device__ __forceinline__ void subtract_log_sums(const FusedBlock& b,
                                                  QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                                  float (&logit)[kSteps][kQuads][4]) {
  const int lane = b.lane;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
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
    for (int i = 0; i < kSteps; ++i)
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
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) logit[i][q][j] = __fsub_rn(logit[i][q][j], query.weight[q].log_sum);
  }
}

// Scores the warp's tiles, whose stage is at `data`; calls next() when it has read them.
template <int kChunks, Mode kMode, int kQuads, class Next>
__device__ __forceinline__ void score_sample(const FusedBlock& b, QueryFragments<kChunks, kMode, kQuads>& query,
                                             const SampleTiles& tiles, uint32_t data, Next next) {
  using Reader = StageReader<kChunks, kMode>;
  using Scores = SetScores<kMode, kQuads>;
  const Reader reader(tiles.shape);
  LaneSample sample[Scores::kSetQuads];
  float logit[Reader::kSteps][kQuads][4];
#pragma unroll
  for (int i = 0; i < Reader::kSteps; ++i) {
    const int here = tiles.has(reader.token[i]) ? b.plan.length - tiles.token(reader.token[i]) : 0;
    Signatures<kChunks, kMode> signatures;
    reader.load(signatures, data, i);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kMode == Mode::dot_max) {
        logit_quad(query, signatures, q, logit[i][q]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j >= here) logit[i][q][j] = -INFINITY;
      } else {
        float score[4];
        score_quad(query, signatures, q, score);
#pragma unroll
        for (int j = 0; j < 4; ++j) sample[q].add(score[j], j < here);
      }
    }
  }
  __syncwarp();  // every lane has read the slot
  next();
  if constexpr (kMode == Mode::dot_max) {
    subtract_log_sums(b, query, logit);
#pragma unroll
    for (int i = 0; i < Reader::kSteps; ++i) {
      const float score = maximum_of_heads(logit[i]);
      sample[0].add(score, score > -INFINITY);
    }
  }
#pragma unroll
  for (int q = 0; q < Scores::kSetQuads; ++q)
    sample[q].template store<Scores::kSetStride>(b.m.samples + b.warp * b.sets + q * 4, b.sets - q * 4);
}

// The bins of a warp's set, from the sample.
__device__ __forceinline__ void find_bins(const FusedBlock& b) {
  ScoreSample sample{0.0f, 0.0f, 0};
  if (b.lane < kFusedWarps) sample = b.m.samples[b.lane * b.sets + b.warp];
  const float sum = warp_sum(sample.sum), squares = warp_sum(sample.squares);
  const float count = float(__reduce_add_sync(kFull, sample.count));
  if (b.lane) return;
  FusedHead& head = b.m.heads[b.warp];
  const ScoreBinning bins(sum, squares, count, __fdividef(b.plan.need, b.plan.middle));
  head.low = bins.low, head.scale = bins.scale;
  head.size = INT_MAX, head.wanted = b.plan.need, head.edge = 0, head.placed = 0;
  head.exact = b.plan.need == 0;
  head.from = head.to = ~0ull;  // no rank
  if (bins.scale > 0) b.m.search_failed() = 0;
}

template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_own_tokens(const FusedBlock& b) {
  using Reader = StageReader<kChunks, kMode>;
  using Scores = SetScores<kMode, kQuads>;
  constexpr int kSetQuads = Scores::kSetQuads;
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
  const SampleTiles tiles(p.page, plan.length, warp);
  const int tile_token = tiles.token(lane % kTilesPerWarp * kTile);
  const uint32_t tile_block = __ldg(blocks + block_index(p.page, tile_token / kQuad));
  QueryMemory queries{m.planes, m.bias, m.weights, m.scores};
  clear_queries<kChunks, kMode>(p, queries);
  for (int i = threadIdx.x; i < b.sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
  if (kMode == Mode::dot_max && threadIdx.x < 4 * kMaxHeadQuads) m.tops[threadIdx.x] = m.sums[threadIdx.x] = 0;
  if (threadIdx.x == 0) m.search_failed() = 1;  // until there are bins
  b.begin();

  uint16_t raw[kChunks * 4] = {};
  if (warp < p.group) load_raw(raw, p.query, b.row, b.kv_head * p.group + warp, p.page.words);
  auto fill = [&](int slot, int token, uint32_t block) {
    if (token < plan.length) ring.fill(slot, p.page, shape, pages, token, plan.length, block);
  };
  int token = b.first_token(warp);
  ring.fill_parts(0, p.page, tiles.shape, pages, tile_token, tiles.parts(), tile_block);  // the first slot's first use
#pragma unroll
  for (int i = 0; i < kFusedStages - 1; ++i) fill(1 + i, token + i * stride, block[i]);
  uint32_t next_block = load_stage_block(p, shape, blocks, token + kFusedStages * stride, plan.length);
  float x[kChunks * 4];
  widen(x, raw, p.query.element);
  __syncthreads();
  encode_queries<kChunks, kMode>(p, x, queries);
  QueryFragments<kChunks, kMode, kQuads> query;
  query.load(m.planes, m.bias, p.head_quads);
  if constexpr (kMode == Mode::dot_max) query.load_weights(m.weights, p.head_quads);
  ring.wait(0, 0);
  constexpr int kLast = kFusedStages - 1;
  score_sample(b, query, tiles, ring.data(0), [&] { fill(0, token + kLast * stride, block[kLast]); });
  __syncthreads();
  if (warp < b.sets) find_bins(b);

  const Reader reader(shape);
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
  int slot = 1;
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
  __syncthreads();
}

}  // namespace adamas
