// Stage 4 of the fused kernel: merges the warps' softmax states into the output.
//
// First a block merges its warps, one thread per output value. Every block of the cluster then finishes an equal run
// of the group's outputs: the other blocks send it their parts and the softmax state of every head, and it merges them
// after one cluster barrier.
#pragma once
#include "sm90/attention.cuh"
#include "sm90/decode_fused/block.cuh"

namespace adamas {

template <int D, class T, class Softmax>
__device__ __forceinline__ void merge_cluster(const FusedBlock& b, Softmax& softmax) {
  const DecodeParams& p = b.p;
  const FusedMemory& m = b.m;
  const FusedShape& s = b.s;
  const int rank = b.rank, lane = b.lane;
  softmax.finish();
  softmax.share(m.states, 0, p.group);
  __syncthreads();
  const int outputs = p.group * D, own = (outputs + s.cluster - 1) / s.cluster;
  const int active = m.search.active;
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
    const int head = i / D, d = i % D;
    const float* from = m.states + head * Softmax::kHeadFloats;
    const SoftmaxValue x = active == 1 ? SoftmaxValue{from[0], from[4 + d], from[1]}
                                       : merge_parts<2>(from, active, p.group * Softmax::kHeadFloats, d);
    const int to = i / own;
    remote_store(remote(m.partial + rank * own + i - to * own, to), x.value);
    if (d < s.cluster)  // one thread per receiving block
      remote_store8(remote(m.softmax + rank * p.group + head, d),
                    make_uint2(__float_as_uint(x.top), __float_as_uint(x.sum)));
  }
  cluster_sync();
  // Eight lanes merge the parts of a large cluster, one lane those of a small one.
  const int lanes = s.cluster > 4 ? 8 : 1;
#pragma unroll 1
  for (int i = threadIdx.x / lanes; i < (own + 31) / 32 * 32; i += blockDim.x / lanes) {
    const int at = min(rank * own + i, outputs - 1), head = at / D;
    float best = -INFINITY, value = 0, total = 0;
#pragma unroll 1
    for (int r = lane % lanes; r < s.cluster; r += lanes) best = fmaxf(best, m.softmax[r * p.group + head].x);
#pragma unroll 1
    for (int step = 1; step < lanes; step *= 2) best = fmaxf(best, __shfl_xor_sync(kFull, best, step));
#pragma unroll 1
    for (int r = lane % lanes; r < s.cluster; r += lanes) {
      const float2 state = m.softmax[r * p.group + head];
      const float weight = softmax_weight(state.x, best);
      value += weight * m.partial[r * own + min(i, own - 1)];
      total += weight * state.y;
    }
#pragma unroll 1
    for (int step = 1; step < lanes; step *= 2) {
      value += __shfl_xor_sync(kFull, value, step);
      total += __shfl_xor_sync(kFull, total, step);
    }
    if (lane % lanes == 0 && i < own && rank * own + i < outputs) {
      b.output<T>(head)[at % D] = T(softmax_output(p, b.kv_head * p.group + head, {best, value, total}));
      if (at % D == 0) store_lse(p, b.row, b.kv_head * p.group + head, best, total);
    }
  }
}

}  // namespace adamas
