// Stage 3 of the fused kernel: each block attends to its own selected tokens or, in a dense row, to its share of all
// tokens. Blocks do not communicate; K and V rows are loaded directly from the page.
#pragma once
#include "sm90/attention.cuh"
#include "sm90/decode_fused/threshold.cuh"

namespace adamas {

// The warps of a token set list its selected tokens in order, as many at a time as fit, then take chunks of kChunk
// tokens in turn. Ends with the warps' softmax states in registers.
template <class Softmax>
__device__ __forceinline__ void attend_selected(const FusedBlock& b, const Candidates& candidates, Softmax& softmax) {
  const DecodeParams& p = b.p;
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, set = b.set, sets = b.sets, sub = b.sub, warps_per_set = b.warps_per_set;
  const int own = min(set, sets - 1);  // warps past the last set attend to nothing
  softmax.start(p, b.row, b.kv_head * p.group + (p.per_query_head ? own : 0), p.per_query_head ? 1 : p.group);
  const float score = m.heads[own].score;
  const int token = m.heads[own].token;
  auto chosen = [&](float x, int index, bool here) {
    return here && (x > score || (x == score && b.token(index) >= token));
  };
  int count = 0;
  candidates.each(
      [&](float x, int index, bool here) { count += __popc(__ballot_sync(kFull, chosen(x, index, here))); });
  if (lane == 0) m.warps[warp] = count;
  __syncthreads();
  int before = 0, total = 0;  // selected tokens of the set: in preceding warps, in all warps
  for (int w = 0; w < warps_per_set && set < sets; ++w) {
    const int other = m.warps[set * warps_per_set + w];
    if (w < sub) before += other;
    total += other;
  }
  if (sub == 0 && lane == 0 && set < sets) m.heads[set].active = min(warps_per_set, (total + kChunk - 1) / kChunk);
  const int room = kTokens / sets;
  int* tokens = m.tokens + own * room;
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  auto key_row = [&](int token) { return pages + key_offset<Softmax::kRowBytes>(p.page, blocks, token); };
  for (int round = 0;; round += room) {
    int at = before - round;
    candidates.each([&](float x, int index, bool here) {
      const bool take = chosen(x, index, here);
      const uint32_t takers = __ballot_sync(kFull, take);
      const int to = at + __popc(takers & ((1u << lane) - 1));
      if (take && uint32_t(to) < uint32_t(room)) tokens[to] = b.token(index);
      at += __popc(takers);
    });
    __syncthreads();
    const int here = min(total - round, room);
    for (int chunk = sub * kChunk; chunk < here; chunk += warps_per_set * kChunk)
      softmax.step([&](int slot) { return key_row(tokens[min(chunk + slot, here - 1)]); }, p.page.v_offset, 0,
                   here - chunk, p.softmax_scale);
    if (!__syncthreads_or(total > round + room)) break;
  }
}

// A dense row: chunks are dealt over the warps of the whole cluster.
template <class Softmax>
__device__ __forceinline__ void attend_all(const FusedBlock& b, Softmax& softmax) {
  const DecodeParams& p = b.p;
  softmax.start(p, b.row, b.kv_head * p.group, p.group);
  const int32_t* blocks = row_blocks(p, b.row);
  const uint8_t* pages = head_pages(p, b.kv_head);
  const int chunks = (b.plan.length + kChunk - 1) / kChunk;
  for (int i = b.plan.first / kChunk + b.rank + b.warp * b.s.cluster; i < chunks; i += b.s.cluster * kFusedWarps)
    softmax.attend_chunk(p, b.plan, pages, blocks, i * kChunk);
  if (threadIdx.x == 0) b.m.heads[0].active = kFusedWarps;
}

}  // namespace adamas
