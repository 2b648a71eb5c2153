// Dense rows, processed by blocks as workers when they have finished their sparse work. Each takes an equal run of the
// chunks of all dense rows, which may begin and end within a (row, KV head).
//
// The warps of a worker take the chunks of a (row, KV head) in turn. A worker that has all of them writes the output.
// Otherwise it stores its state in global memory, and the last worker to finish a shared (row, KV head) merges the
// states, so no worker waits.
#pragma once
#include "sm90/attention.cuh"
#include "sm90/launch.cuh"

namespace adamas {

// Whether the step has a dense row. All threads call it; ends synchronised.
__device__ __forceinline__ bool any_dense_row(const DecodeParams& p) {
  bool dense = false;
  for (int row = threadIdx.x; row < p.num_rows; row += blockDim.x) {
    const RowPlan plan(p, row);
    dense |= plan.length > 0 && !plan.sparse;
  }
  return __syncthreads_or(dense);
}

// Shared memory that attend_dense() needs.
template <class Softmax>
ADAMAS_BOTH int dense_bytes(const DecodeParams& p, int warps) {
  const int heads = p.group < 8 ? p.group : 8;
  return (p.num_rows + 1) * 8 + 32 + warps * heads * Softmax::kHeadFloats * 4;
}

// `most`: blocks that call it, as worker 0, 1, ...; `warps`: of a block.
template <class T, class Softmax>
__device__ __forceinline__ void attend_dense(const DecodeParams& p, int worker, int most, uint8_t* memory, int warps) {
  constexpr int kStateFloats = Softmax::kFloats * 32;  // per warp
  int64_t* cum = reinterpret_cast<int64_t*>(memory);
  int* last = reinterpret_cast<int*>(cum + p.num_rows + 1);
  float* buffer = reinterpret_cast<float*>(memory + ((p.num_rows + 1) * 8 + 31) / 16 * 16);
  const int warp = threadIdx.x / 32, kv_heads = p.page.num_kv_heads;
  auto row_chunks = [&](const RowPlan& plan) {
    return plan.sparse || plan.length <= 0 ? 0 : (plan.length + kChunk - 1) / kChunk - plan.first / kChunk;
  };
  prefix_sum_rows(cum, p.num_rows, [&](int row) { return int64_t(row_chunks(RowPlan(p, row))) * kv_heads; });
  // At most one worker per chunk, so that each has at least one chunk.
  const int64_t total = cum[p.num_rows], workers = min(int64_t(most), total);
  if (worker >= workers) return;
  int64_t at = total * worker / workers;
  const int64_t end = total * (worker + 1) / workers;
  wait_for_preceding_kernel();
  while (at < end) {
    const int row = find_row(cum, p.num_rows, at);
    const RowPlan plan(p, row);
    const int chunks = row_chunks(plan);
    const int64_t in_row = at - cum[row];
    const int kv_head = int(in_row / chunks), first = int(in_row % chunks);
    const int count = int(min(end - at, int64_t(chunks - first)));
    const int64_t group = int64_t(row) * kv_heads + kv_head;

    Softmax softmax;
    softmax.start(p, row, kv_head * p.group, p.group);
    const int32_t* blocks = row_blocks(p, row);
    const uint8_t* pages = head_pages(p, kv_head);
    for (int i = warp; i < count; i += warps)
      softmax.attend_chunk(p, plan.first, plan.length, pages, blocks, (plan.first / kChunk + first + i) * kChunk);
    softmax.finish();
    if (count == chunks) {
      softmax.write_merged(p, warps, buffer, row, kv_head * p.group, p.group);
    } else {
      // Workers [low, high] share this (row, KV head).
      const int64_t start = at - first;
      const int low = int(((start + 1) * workers + total - 1) / total) - 1;
      const int high = int(((start + chunks) * workers + total - 1) / total) - 1;
      softmax.merge_warps(warps, buffer, p.group);
      if (warp == 0) {
        softmax.store(p.work.partials + (worker + group) * kStateFloats);
        __threadfence();  // orders each lane's state before the arrival of lane 0
        __syncwarp();
        if (threadIdx.x == 0) *last = atomicInc(p.work.arrived + group, high - low) == uint32_t(high - low);
      }
      __syncthreads();
      if (*last) {
        __threadfence();  // orders the arrivals before loads of the other workers' states
        softmax.reset();
        for (int w = low + warp; w <= high; w += warps)
          softmax.merge(p.work.partials + (w + group) * kStateFloats);
        softmax.write_merged(p, warps, buffer, row, kv_head * p.group, p.group);
      }
    }
    __syncthreads();  // buffer and `last` are free again
    at += count;
  }
}

}  // namespace adamas
