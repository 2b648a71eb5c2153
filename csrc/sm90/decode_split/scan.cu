// scan: every signature of every sparse row, once, for all query heads of its KV head. Scores at or
// above the pivot become candidates.
//
// Most of the work is dealt to the warps in equal shares ahead, the rest in small pieces to whoever is
// free: multiprocessors get unequal shares of the bandwidth, and warps unequal ones of theirs.
#include <algorithm>

#include "sm90/pipeline.cuh"
#include "sm90/score.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDealFrom = 8;    // stages of a warp, from which on some are dealt when they are reached:
constexpr int kDealtShare = 4;  // one in so many

// Registers and shared memory of these fit an SM.
constexpr int ring_stages(int chunks, int quads) { return chunks == 1 && quads < 4 ? 3 : 2; }
// Candidates that a lane holds back per head quad; four may come at a time.
constexpr int queue_length(int chunks, int quads) { return chunks == 2 && quads == 4 ? 5 : 8; }
constexpr int blocks_per_processor(int chunks, int quads) { return chunks * quads == 1 ? 3 : 2; }

// Moves what the lanes hold back for one head quad to the heads' candidates. queue: [length][32]
__device__ __noinline__ void flush(const DecodeParams& p, const uint2* queue, int count, int set) {
  const int lane = threadIdx.x % 32;
  int sum = count;  // over the lanes of the same head, up to this one
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFull, sum, step);
    if (lane >= step) sum += other;
  }
  uint32_t at = 0;
  if (lane >= 28 && sum) at = atomicAdd(p.work.count + set, uint32_t(sum));
  at = __shfl_sync(kFull, at, 28 + lane % 4) + sum - count;
  for (int i = 0; i < count; ++i)
    if (at + i < uint32_t(p.capacity)) p.work.candidates[int64_t(set) * p.capacity + at + i] = queue[i * 32 + lane];
}

// kAll: every score is written to p.scores, and there are no candidates.
template <int kChunks, Mode kMode, int kQuads, bool kAll>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kChunks, kQuads))
    scan_kernel(const __grid_constant__ DecodeParams p, int bytes) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int kStages = ring_stages(kChunks, kQuads), kQueue = queue_length(kChunks, kQuads);
  constexpr int kSteps = StageReader<kChunks, kMode>::kSteps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint8_t* at_memory = memory + kWarps * kStages * bytes;
  uint2* queue = reinterpret_cast<uint2*>(at_memory) + warp * (kQuads * kQueue * 32);
  at_memory += kWarps * kQuads * kQueue * 32 * sizeof(uint2);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(at_memory) + warp * kStages;
  int64_t* cum = reinterpret_cast<int64_t*>(at_memory) + kWarps * kStages;
  let_next_start();
  const StageShape shape(p.page);
  const bool simple = shape.whole_blocks && shape.parts == 1;  // a stage is a block
  const int kv_heads = p.page.num_kv_heads;
  StageRing<kStages> ring(memory + warp * kStages * bytes, barriers, bytes);
  prefix_rows(cum, p.num_rows, [&](int row) {
    const RowPlan plan(p, row);
    return plan.sparse ? int64_t((plan.length + shape.tokens - 1) / shape.tokens) * kv_heads : 0;
  });

  const StageReader<kChunks, kMode> reader(shape);

  const uint32_t total = uint32_t(cum[p.num_rows]), warps = gridDim.x * kWarps, share = total / warps;
  const uint32_t self = blockIdx.x * kWarps + warp;
  const bool deal = share >= kDealFrom;
  const uint32_t fixed = share - share / kDealtShare, dealt = fixed * warps;
  uint32_t at = deal ? fixed * self : total * self / warps;
  uint32_t end = deal ? at + fixed : total * (self + 1) / warps;
  bool waited = false;
  uint32_t piece = 0;  // lane 0: the next one of this warp
  int slot = 0;        // of the next stage to score
  uint32_t phase = 0;
  for (;;) {
    if (at >= end) {
      if (!deal) break;
      at = dealt + __shfl_sync(kFull, piece, 0) * kStages;
      if (at >= total) break;
      end = min(at + kStages, total);
      if (lane == 0) piece = atomicAdd(p.work.pieces, 1u);
    }
    const int row = find_row(cum, p.num_rows, at);
    const RowPlan plan(p, row);
    const uint32_t row_stages = (plan.length + shape.tokens - 1) / shape.tokens, in_row = uint32_t(at - cum[row]);
    const int kv_head = int(in_row / row_stages), first = int(in_row % row_stages);
    const int stages = int(min(end - at, row_stages - first));
    const int64_t group = int64_t(row) * kv_heads + kv_head;
    const int first_set = int(group) * p.score_heads_per_kv;
    const int middle_end = p.num_sink_tokens + plan.middle;

    const int32_t* blocks = p.block_table + row * p.blocks_per_row + (simple ? first : 0);
    const uint8_t* run = p.page.base + kv_head * p.page.head_stride + (simple ? p.page.hi_offset : 0);
    auto block_of = [&](int stage) -> uint32_t {  // of this lane's part
      if (simple) return stage < stages ? __ldg(blocks + stage) : 0;
      const int token = (first + stage) * shape.tokens + lane * shape.part_tokens;
      return lane < shape.parts && stage < stages && token < plan.length
                 ? __ldg(blocks + block_of_quad(p.page, token / kQuad))
                 : 0;
    };
    auto fill = [&](int slot, int stage, uint32_t block) {
      if (stage >= stages) return;
      if (simple) ring.fill(slot, run + uint64_t(block) * p.page.block_stride, shape.part_bytes);
      else ring.fill(slot, p.page, shape, run, (first + stage) * shape.tokens, plan.length, block);
    };
    uint32_t block[kStages];
#pragma unroll
    for (int i = 0; i < kStages; ++i) block[i] = block_of(i);
#pragma unroll
    for (int i = 0; i < kStages; ++i) fill(slot + i < kStages ? slot + i : slot + i - kStages, i, block[i]);
    uint32_t next_block = block_of(kStages);

    // Nothing above needs encode to have finished.
    if (!waited) {
      touch(p);
      wait_for_previous();
      if (deal && lane == 0) piece = atomicAdd(p.work.pieces, 1u);
    }
    waited = true;
    QueryFragments<kChunks, kMode, kQuads> query;
    query.load(p.work.planes + group * p.head_quads * query_planes(kMode) * kChunks * 32,
               p.work.bias + group * 4 * p.head_quads, p.head_quads);
    float above[kQuads], above_late[kQuads];  // tokens with a larger score are kept
    int late[kQuads];                         // from the stage with this token on the second limit holds
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int head = q * 4 + lane % 4;
      const bool here = head < p.score_heads_per_kv;
      above[q] = here ? p.work.pivot_score[first_set + head] : INFINITY;
      late[q] = here ? p.work.pivot_token[first_set + head] : INT_MAX;
      above_late[q] = above[q] > -INFINITY ? next_below(above[q]) : above[q];
    }
    const uint32_t queues = uint32_t(__cvta_generic_to_shared(queue)) + lane * 8;
    auto queue_start = [&](int q) { return queues + q * (kQueue * 256); };
    uint32_t tail[kQuads];  // shared address of the queue's end
#pragma unroll
    for (int q = 0; q < kQuads; ++q) tail[q] = queue_start(q);
    auto empty = [&](int q) {
      // A lane beyond the last head keeps nothing and reports to the last one.
      const int set = first_set + min(q * 4 + lane % 4, p.score_heads_per_kv - 1);
      flush(p, queue + q * kQueue * 32, int(tail[q] - queue_start(q)) / 256, set);
      tail[q] = queue_start(q);
    };

    for (int stage = 0; stage < stages; ++stage) {
      ring.wait(slot, phase);
      const uint32_t data = ring.data(slot);
      const int stage_token = (first + stage) * shape.tokens;
      const bool edge = stage_token < p.num_sink_tokens || stage_token + kStageTokens > middle_end ||
                        shape.tokens != kStageTokens;
      Signatures<kChunks, kMode> signatures[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) reader.load(signatures[i], data, i);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int head = q * 4 + lane % 4;
        const float limit = stage_token + kStageTokens > late[q] ? above_late[q] : above[q];
        float scores[kSteps][4];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) score_quad(query, signatures[i], q, scores[i]);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int token = stage_token + reader.token[i];
          float(&score)[4] = scores[i];
          if constexpr (kAll) {
            float* to = p.scores + row * p.scores_row_stride +
                        (kv_head * p.score_heads_per_kv + head) * p.scores_head_stride + token;
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (head < p.score_heads_per_kv && token + j < plan.length) to[j] = score[j];
            continue;
          }
          if (edge) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (token + j < p.num_sink_tokens || token + j >= middle_end) score[j] = -INFINITY;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j)
            asm volatile(
                "{ .reg .pred p; setp.gt.f32 p, %1, %2; @p st.shared.v2.b32 [%0], {%3, %4}; @p add.u32 %0, %0, 256; }"
                : "+r"(tail[q])
                : "f"(score[j]), "f"(limit), "r"(__float_as_uint(score[j])), "r"(token + j)
                : "memory");
          if (__any_sync(kFull, tail[q] > queue_start(q) + (kQueue - 4) * 256)) empty(q);
        }
      }
      __syncwarp();
      fill(slot, stage + kStages, next_block);
      next_block = block_of(stage + kStages + 1);
      if (++slot == kStages) slot = 0, phase ^= 1;
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (__any_sync(kFull, tail[q] > queue_start(q))) empty(q);
    at += stages;
  }
  if (!waited) wait_for_previous();  // attend relies on encode having finished
}

}  // namespace

void scan(const DecodeParams& p, void* stream) {
  with_scan_types(p, [&](auto chunks, auto mode, auto quads) {
    constexpr int kChunks = decltype(chunks)::value, kQuads = decltype(quads)::value;
    constexpr int kStages = ring_stages(kChunks, kQuads), kQueue = queue_length(kChunks, kQuads);
    const int bytes = stage_bytes(p.page);
    const int smem = kWarps * (kStages * (bytes + 8) + kQuads * kQueue * 32 * int(sizeof(uint2))) +
                     (p.num_rows + 1) * int(sizeof(int64_t));
    constexpr Mode kMode = decltype(mode)::value;
    const int blocks = std::max(1, std::min(blocks_per_processor(kChunks, kQuads), blocks_that_fit(smem)));
    launch(p.scores ? scan_kernel<kChunks, kMode, kQuads, true> : scan_kernel<kChunks, kMode, kQuads, false>,
           dim3(blocks * num_multiprocessors()), kThreads, smem, stream, true, "scan", p, bytes);
  });
}

}  // namespace adamas
