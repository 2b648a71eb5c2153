// scan, the second of the three kernels: reads every signature of every sparse row once, for all query heads of its KV
// head. Tokens with scores at or above the pivot become candidates.
//
// The rows of a request that verifies drafts may be scanned together (shared.cuh): each signature is read and widened once for
// up to kRunRows of them.
//
// The grid fills the device once. A warp works alone: it takes runs of stages (StageDealer), streams them through its
// ring and scores a token quad for one head of four per lane. The kernel is bound by memory bandwidth. It starts
// fetching while encode still runs, and waits for encode when its ring is full.
#pragma once
#include <algorithm>

#include "sm90/decode_split/queue.cuh"
#include "sm90/decode_split/shared.cuh"
#include "sm90/launch.cuh"
#include "sm90/order.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/score.cuh"

namespace adamas {

// Where a block has less shared memory, its warps are fewer, and the rings of all shapes fit.
constexpr int kThreads = kHopper ? 256 : 128, kWarps = kThreads / 32;
constexpr int kDealFrom = 8;    // stages per warp from which part of them is dealt on demand
constexpr int kDealtShare = 4;  // one stage in kDealtShare is dealt on demand

// Stages per ring, limited by the registers and the shared memory of an SM.
constexpr int ring_stages(int chunks, int quads) { return chunks == 1 && quads < 4 ? 3 : 2; }
constexpr int blocks_per_processor(int chunks, int quads) {
  if (!kHopper) return quads < 4 ? 4 : 3;
  return chunks * quads == 1 ? 3 : 2;
}

// The stages of all sparse rows, numbered in row order, dealt to the warps of the grid.
//
// Most of them are dealt in equal shares in advance, and the rest on demand in pieces of kPiece stages, because
// neither SMs nor the warps of an SM get equal shares of the bandwidth. A piece is claimed one piece ahead of its use.
template <int kPiece>
struct StageDealer {
  uint32_t at, end;  // the current run
  uint32_t total, dealt;
  bool on_demand;
  uint32_t piece = 0;  // lane 0: the warp's next piece

  __device__ explicit StageDealer(uint32_t total) : total(total) {
    const uint32_t warps = gridDim.x * kWarps, share = total / warps;
    const uint32_t self = blockIdx.x * kWarps + threadIdx.x / 32;
    on_demand = share >= kDealFrom;
    const uint32_t fixed = share - share / kDealtShare;
    dealt = fixed * warps;
    at = on_demand ? fixed * self : total * self / warps;
    end = on_demand ? at + fixed : total * (self + 1) / warps;
  }

  // Claims the next piece; must not be called before encode has zeroed the counter.
  __device__ __forceinline__ void fetch(uint32_t* pieces) {
    // In assembly, because the compiler would wait for the number here, to hand it to the other lanes.
    if (threadIdx.x % 32 == 0) asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(piece) : "l"(pieces) : "memory");
  }

  // Whether a stage is left, in the current run or in another one.
  __device__ __forceinline__ bool advance(uint32_t* pieces) {
    if (at < end) return true;
    if (!on_demand) return false;
    at = dealt + __shfl_sync(kFull, piece, 0) * kPiece;
    if (at >= total) return false;
    end = min(at + kPiece, total);
    fetch(pieces);
    return true;
  }
};

// The rows that a warp scores together: one, with all its token sets.
template <int kChunks, Mode kMode, int kQuads>
struct OneRow : SetScores<kMode, kQuads> {
  // Entries of a lane's queue per head quad; up to four are appended at a time.
  static constexpr int kQueue = kChunks == 2 && kQuads == 4 ? 5 : 8;
  using Query = QueryFragments<kChunks, kMode, kQuads>;
  RowPlan plan;
  int row, end;  // end: of the middle

  __device__ OneRow(const DecodeParams& p, int row)
      : plan(p, row), row(row), end(p.num_sink_tokens + plan.middle) {}
  static __device__ int length(const DecodeParams& p, int row) { return sparse_length(p, row); }
  __device__ int length() const { return plan.length; }
  __device__ int least_end() const { return end; }
  __device__ TokenSets sets(const DecodeParams& p, int kv_head) const {
    return {(row * p.page.num_kv_heads + kv_head) * p.score_heads_per_kv, p.score_heads_per_kv, 1};
  }
  __device__ bool listed(int) const { return true; }
  __device__ void load(Query& query, const DecodeParams& p, int kv_head) const {
    const int64_t group = int64_t(row) * p.page.num_kv_heads + kv_head;
    query.load(p.work.planes + group * p.head_quads * query_planes(kMode) * kChunks * 32,
               p.work.bias + group * 4 * p.head_quads, p.head_quads);
    if constexpr (kMode == Mode::dot_max)
      query.load_weights(p.work.weights + group * 4 * p.head_quads, p.head_quads);
  }
};

// With kAll, every score is written to p.scores, and there are no candidates.
template <int kChunks, Mode kMode, int kQuads, bool kAll, class Rows>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kChunks, kQuads))
    scan_kernel(const __grid_constant__ DecodeParams p, int bytes) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int kStages = ring_stages(kChunks, kQuads);
  constexpr int kSteps = StageReader<kChunks, kMode>::kSteps;
  constexpr int kSetQuads = Rows::kSetQuads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint8_t* at_memory = memory + kWarps * kStages * bytes;
  uint2* queue = reinterpret_cast<uint2*>(at_memory) + warp * (kSetQuads * Rows::kQueue * 32);
  at_memory += kWarps * kSetQuads * Rows::kQueue * 32 * sizeof(uint2);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(at_memory) + warp * kStages;
  int64_t* cum = reinterpret_cast<int64_t*>(at_memory) + kWarps * kStages;
  launch_dependents();
  const StageShape shape(p.page);
  const bool simple = shape.one_block();
  const int kv_heads = p.page.num_kv_heads;
  StageRing<kStages> ring(memory + warp * kStages * bytes, barriers, bytes);
  prefix_sum_rows(cum, p.num_rows, [&](int row) {
    return int64_t((Rows::length(p, row) + shape.tokens - 1) / shape.tokens) * kv_heads;
  });

  const StageReader<kChunks, kMode> reader(shape);

  StageDealer<kStages> dealer{uint32_t(cum[p.num_rows])};
  bool waited = false;
  int slot = 0;  // slot of the next stage to score
  uint32_t phase = 0;
  while (dealer.advance(p.work.pieces)) {
    const int row = find_row(cum, p.num_rows, dealer.at);
    const Rows rows(p, row);
    const int length = rows.length();
    const uint32_t row_stages = (length + shape.tokens - 1) / shape.tokens;
    const uint32_t in_row = uint32_t(dealer.at - cum[row]);
    const int kv_head = int(in_row / row_stages), first = int(in_row % row_stages);
    const int stages = int(min(dealer.end - dealer.at, row_stages - first));
    const TokenSets sets = rows.sets(p, kv_head);
    const int end = rows.end, least_end = rows.least_end();

    const int32_t* blocks = row_blocks(p, row) + (simple ? first : 0);
    const uint8_t* pages = head_pages(p, kv_head) + (simple ? p.page.hi_offset : 0);
    auto load_block = [&](int stage) -> uint32_t {  // block of this lane's part
      if (simple) return stage < stages ? __ldg(blocks + stage) : 0;
      return load_stage_block(p, shape, blocks, (first + stage) * shape.tokens, length, stage < stages);
    };
    auto fill = [&](int slot, int stage, uint32_t block) {
      if (stage >= stages) return ring.fill_nothing();
      if (simple) ring.fill(slot, pages + uint64_t(block) * p.page.block_stride, shape.part_bytes);
      else ring.fill(slot, p.page, shape, pages, (first + stage) * shape.tokens, length, block);
    };
    uint32_t block[kStages];
#pragma unroll
    for (int i = 0; i < kStages; ++i) block[i] = load_block(i);
#pragma unroll
    for (int i = 0; i < kStages; ++i) fill(slot + i < kStages ? slot + i : slot + i - kStages, i, block[i]);
    uint32_t next_block = load_block(kStages);

    // Nothing above depends on encode.
    if (!waited) {
      prefetch_params(p);
      wait_for_preceding_kernel();
      if (dealer.on_demand) dealer.fetch(p.work.pieces);
    }
    waited = true;
    typename Rows::Query query;
    rows.load(query, p, kv_head);
    // Tokens with a score above the limit are kept. From the stage of the pivot's token on, tokens with the pivot's
    // score are kept as well.
    float above[kSetQuads], above_late[kSetQuads];
    int late[kSetQuads];
#pragma unroll
    for (int q = 0; q < kSetQuads; ++q) {
      const int set = Rows::set(q);
      const bool here = set < sets.count && rows.listed(set);
      above[q] = here ? p.work.pivot_score[sets(set)] : INFINITY;
      late[q] = here ? p.work.pivot_token[sets(set)] : INT_MAX;
      above_late[q] = above[q] > -INFINITY ? next_below(above[q]) : above[q];
    }
    CandidateQueues<kSetQuads, Rows::kQueue, Rows::kSetStride> queues(queue, lane, sets);

    for (int stage = 0; stage < stages; ++stage) {
      ring.wait(slot, phase);
      const uint32_t data = ring.data(slot);
      const int stage_token = (first + stage) * shape.tokens;
      const bool edge = stage_token < p.num_sink_tokens || stage_token + kStageTokens > least_end ||
                        shape.tokens != kStageTokens;
      Signatures<kChunks, kMode> signatures[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) reader.load(signatures[i], data, i);
#pragma unroll
      for (int q = 0; q < kSetQuads; ++q) {
        const float limit = stage_token + kStageTokens > late[q] ? above_late[q] : above[q];
        float scores[kSteps][Rows::kScores];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) score_set(query, signatures[i], q, scores[i]);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int token = stage_token + reader.token[i] + Rows::first();
          float(&score)[Rows::kScores] = scores[i];
          if constexpr (kAll) {
            const int head = Rows::set(q);
            float* to = p.scores + row * p.scores_row_stride +
                        (kv_head * p.score_heads_per_kv + head) * p.scores_head_stride + token;
#pragma unroll
            for (int j = 0; j < Rows::kScores; ++j)
              if (head < p.score_heads_per_kv && token + j < length) to[j] = score[j];
            continue;
          }
          if (edge) {
#pragma unroll
            for (int j = 0; j < Rows::kScores; ++j)
              if (token + j < p.num_sink_tokens || token + j >= end) score[j] = -INFINITY;
          }
#pragma unroll
          for (int j = 0; j < Rows::kScores; ++j) queues.push(q, score[j], limit, token + j);
          queues.make_room(p, q);
        }
      }
      __syncwarp();  // every lane has read the slot
      fill(slot, stage + kStages, next_block);
      next_block = load_block(stage + kStages + 1);
      if (++slot == kStages) slot = 0, phase ^= 1;
    }
    queues.flush_all(p);
    dealer.at += stages;
  }
  // Also without work, because attend waits for scan alone and relies on encode having finished.
  if (!waited) wait_for_preceding_kernel();
}

template <int kChunks, Mode kMode, int kQuads, bool kAll, class Rows>
void launch_scan(const DecodeParams& p, void* stream) {
  constexpr int kStages = ring_stages(kChunks, kQuads);
  constexpr int kQueueBytes = Rows::kSetQuads * Rows::kQueue * 32 * int(sizeof(uint2));
  constexpr int kMostStage = kStageTokens * (kChunks * 128 / 4 + 2);
  static_assert(kWarps * (kStages * (kMostStage + 8) + kQueueBytes) + (kMaxRows + 1) * int(sizeof(int64_t)) <=
                kBlockMemory);
  const int bytes = stage_bytes(p.page);
  const int smem = kWarps * (kStages * (bytes + 8) + kQueueBytes) + (p.num_rows + 1) * int(sizeof(int64_t));
  const int blocks = std::max(1, std::min(blocks_per_processor(kChunks, kQuads), blocks_that_fit(smem)));
  launch(scan_kernel<kChunks, kMode, kQuads, kAll, Rows>, dim3(blocks * num_multiprocessors()), kThreads, smem, stream,
         true, "scan", p, bytes);
}

}  // namespace adamas
