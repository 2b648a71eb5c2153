// Stage 3 of the fused kernel: each block attends to its own selected tokens, and to its share of the sinks and the
// recent window. Blocks do not communicate; K and V rows are loaded directly from the page.
#pragma once
#include "sm90/attention.cuh"
#include "sm90/decode_fused/threshold.cuh"

namespace adamas {

// The warps list the block's selected tokens in order, as many at a time as fit, then take chunks of kChunk tokens in
// turn. The warps' softmax states stay in registers.
template <class Softmax>
__device__ __forceinline__ void attend_selected(const FusedBlock& b, const Listed& listed, Softmax& softmax) {
  const DecodeParams& p = b.p;
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp;
  const float score = m.search.score;
  const int token = m.search.token;
  auto chosen = [&](float x, int index, bool here) {
    return here && (x > score || (x == score && b.token(index) >= token));
  };
  int count = 0;
  listed.each([&](float x, int index, bool here) { count += __popc(__ballot_sync(kFull, chosen(x, index, here))); });
  if (lane == 0) m.warps[warp] = count;
  __syncthreads();
  const int theirs = lane < b.s.num_warps ? m.warps[lane] : 0;
  const int total = __reduce_add_sync(kFull, theirs);
  int at = __reduce_add_sync(kFull, lane < warp ? theirs : 0);  // selected tokens of the preceding warps
  if (threadIdx.x == 0) m.search.active = max(m.search.active, min(b.s.num_warps, (total + kChunk - 1) / kChunk));
  listed.each([&](float x, int index, bool here) {
    const bool take = chosen(x, index, here);
    const uint32_t takers = __ballot_sync(kFull, take);
    if (take) m.tokens[at + __popc(takers & ((1u << lane) - 1))] = b.token(index);
    at += __popc(takers);
  });
  __syncthreads();
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  auto key_row = [&](int token) { return pages + key_offset<Softmax::kRowBytes>(p.page, blocks, token); };
#pragma unroll 1
  for (int chunk = warp * kChunk; chunk < total; chunk += b.s.num_warps * kChunk)
    softmax.step(p, [&](int slot) { return key_row(m.tokens[min(chunk + slot, total - 1)]); }, p.page.v_offset, 0,
                 total - chunk);
}

// Tokens [first, last): their chunks are dealt over the warps of the whole cluster.
template <class Softmax>
__device__ __forceinline__ void attend_range(const FusedBlock& b, int first, int last, Softmax& softmax) {
  const int32_t* blocks = row_blocks(b.p, b.row);
  const uint8_t* pages = head_pages(b.p, b.kv_head);
  const int chunks = (last + kChunk - 1) / kChunk;
#pragma unroll 1
  for (int i = first / kChunk + b.rank + b.warp * b.s.cluster; i < chunks; i += b.s.cluster * b.s.num_warps)
    softmax.attend_chunk(b.p, first, last, pages, blocks, i * kChunk);
}

}  // namespace adamas
