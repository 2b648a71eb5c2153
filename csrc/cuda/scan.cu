// scan: every signature of every sparse row, once, for all query heads of its KV head. Scores at or
// above the pivot become candidates. The work of all rows is cut into equal runs, one per warp.
#include "scan.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlocksPerProcessor = 2;
constexpr int kStep = 32;              // tokens of one step of a warp
constexpr int kQueue = 16;             // candidates that a lane holds back per head quad

// Moves what the lanes hold back for one head quad to the heads' candidates. queue: [kQueue][32]
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

template <int kChunks, Mode kMode, int kQuads>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) scan_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) uint8_t memory[];
  uint2* queue = reinterpret_cast<uint2*>(memory) + threadIdx.x / 32 * (kQuads * kQueue * 32);
  int64_t* cum = reinterpret_cast<int64_t*>(memory + kWarps * kQuads * kQueue * 32 * sizeof(uint2));
  const int lane = threadIdx.x % 32;
  let_next_start();
  const int kv_heads = p.page.num_kv_heads;
  prefix_rows(cum, p.num_rows, [&](int row) {
    const RowPlan plan(p, row);
    return plan.sparse ? int64_t((plan.length + kStep - 1) / kStep) * kv_heads : 0;
  });

  const int64_t total = cum[p.num_rows], warps = int64_t(gridDim.x) * kWarps;
  const int64_t self = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  int64_t at = total * self / warps;
  const int64_t end = total * (self + 1) / warps;
  bool waited = false;
  while (at < end) {
    const int row = find_row(cum, p.num_rows, at);
    const RowPlan plan(p, row);
    const int row_steps = (plan.length + kStep - 1) / kStep;
    const int kv_head = int((at - cum[row]) / row_steps), first = int((at - cum[row]) % row_steps);
    const int steps = int(min(end - at, int64_t(row_steps - first)));
    const int64_t group = int64_t(row) * kv_heads + kv_head;
    const int first_set = int(group) * p.score_heads_per_kv;

    // A lane beyond the last head keeps nothing and reports to the last one.
    auto set_of = [&](int q) { return first_set + min(q * 4 + lane % 4, p.score_heads_per_kv - 1); };
    QueryFragments<kChunks, kMode, kQuads> query;
    float above[kQuads], above_late[kQuads];  // tokens with a larger score are kept
    int late[kQuads];                         // from this token on the second limit holds
    int count[kQuads] = {};
    scan_quads<kChunks, kMode, kQuads>(
        p.page, kv_head, p.block_table + row * p.blocks_per_row, plan.length, query, steps,
        [&](int step) { return (first + step) * (kStep / kQuad) + lane / 4; },
        [&] {
          if (!waited) wait_for_previous();
          waited = true;
          query.load(p.work.planes + group * p.head_quads * query_planes(kMode) * kChunks * 32,
                     p.work.bias + group * 4 * p.head_quads, p.head_quads);
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            const int head = q * 4 + lane % 4;
            const bool here = head < p.score_heads_per_kv;
            above[q] = here ? p.work.pivot_score[first_set + head] : INFINITY;
            late[q] = here ? p.work.pivot_token[first_set + head] : INT_MAX;
            above_late[q] = above[q] > -INFINITY ? from_order_key(order_key(above[q]) - 1) : above[q];
          }
        },
        [&](int, int token, int q, const float(&score)[4]) {
          const int head = q * 4 + lane % 4;
          if (p.scores) {
            if (head >= p.score_heads_per_kv) return;
            float* to = p.scores + row * p.scores_row_stride +
                        (kv_head * p.score_heads_per_kv + head) * p.scores_head_stride + token;
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (token + i < plan.length) to[i] = score[i];
            return;
          }
          const float limit = token >= late[q] ? above_late[q] : above[q];
          const bool inside = token >= p.num_sink_tokens && token + 4 <= p.num_sink_tokens + plan.middle;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool kept =
                score[i] > limit &&
                (inside || uint32_t(token + i - p.num_sink_tokens) < uint32_t(plan.middle));
            if (kept) {
              queue[(q * kQueue + count[q]) * 32 + lane] = make_uint2(__float_as_uint(score[i]), uint32_t(token + i));
              ++count[q];
            }
          }
          if (__any_sync(kFull, count[q] > kQueue - 4)) {
            flush(p, queue + q * kQueue * 32, count[q], set_of(q));
            count[q] = 0;
          }
        });
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (__any_sync(kFull, count[q] > 0)) flush(p, queue + q * kQueue * 32, count[q], set_of(q));
    at += steps;
  }
  if (!waited) wait_for_previous();  // attend relies on encode having finished
}

}  // namespace

void scan(const DecodeParams& p, void* stream) {
  with_scan_types(p, [&](auto chunks, auto mode, auto quads) {
    const int queues = kWarps * decltype(quads)::value * kQueue * 32 * sizeof(uint2);
    const int smem = queues + (p.num_rows + 1) * sizeof(int64_t);
    launch(scan_kernel<decltype(chunks)::value, decltype(mode)::value, decltype(quads)::value>,
           dim3(kBlocksPerProcessor * num_multiprocessors()), kThreads, smem, stream, true, "scan", p);
  });
}

}  // namespace adamas
