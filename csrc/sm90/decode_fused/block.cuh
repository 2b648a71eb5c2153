// The context of a block in the fused kernel: its place in the cluster, its row, and its own tokens.
//
// Stages of the context (pipeline.cuh) are dealt round robin to the blocks of a cluster, and those of a block to its
// warps. A warp's own tokens are numbered by an index, kStageTokens per own stage.
#pragma once
#include "sm90/address.cuh"
#include "sm90/cluster.cuh"
#include "sm90/decode_fused/memory.cuh"
#include "sm90/launch.cuh"
#include "sm90/rows.cuh"

namespace adamas {

struct FusedBlock {
  const DecodeParams& p;
  const FusedShape& s;
  const FusedMemory m;
  const int lane, warp, rank, row, kv_head;
  const RowPlan plan;

  __device__ FusedBlock(const DecodeParams& p, const FusedShape& s, uint8_t* memory)
      : p(p), s(s), m(s, memory), lane(threadIdx.x % 32), warp(threadIdx.x / 32), rank(cluster_rank()),
        row(blockIdx.z), kv_head(blockIdx.y), plan(p, row) {}

  // Before this call the preceding kernel may still run. It does not write the step's lengths, budgets and block
  // tables, so these may be read earlier. The next kernel is released here and no earlier, because it may fetch pages
  // as soon as it starts.
  __device__ void begin() const {
    prefetch_params(p);
    prefetch_params(s);
    wait_for_preceding_kernel();
    launch_dependents();
    if (threadIdx.x == 0 && rank == 0 && kv_head == 0) count_row(p, plan);
  }

  __device__ __forceinline__ int first_token() const { return (warp * s.cluster + rank) * s.stage.tokens; }
  __device__ __forceinline__ int token(int index) const {
    return first_token() + index / kStageTokens * s.stride + index % kStageTokens;
  }

  template <class T>
  __device__ __forceinline__ T* output(int head) const {
    return head_vector<T>(p.output, row, kv_head * p.group + head);
  }
};

}  // namespace adamas
