// The context of a block in the fused kernel: its place in the cluster, its row, and its own tokens.
//
// Stages of the context (pipeline.cuh) are dealt round robin to the blocks of a cluster, and those of a block to its
// warps. A block's own tokens are numbered by an index, kStageTokens per own stage. After scoring, the warps are
// divided among the token sets: warps_per_set neighbours share the scores of a set in equal runs.
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
  const int lane, warp, rank, row, kv_head, sets;
  const int warps_per_set, set, sub;  // the warp's token set (may be past the last) and its number in the set
  const RowPlan plan;
  int stages;  // own stages
  int part;    // scores per warp of a set

  __device__ FusedBlock(const DecodeParams& p, const FusedShape& s, uint8_t* memory)
      : p(p), s(s), m(s, memory), lane(threadIdx.x % 32), warp(threadIdx.x / 32), rank(cluster_rank()),
        row(blockIdx.z), kv_head(blockIdx.y), sets(p.score_heads_per_kv), warps_per_set(s.warps_per_set),
        set(warp * s.set_magic >> 8), sub(warp - set * warps_per_set), plan(p, row) {
    const uint32_t round = s.stage.tokens / kQuad * s.cluster;  // quads
    const int quads = (plan.length - rank * s.stage.tokens + kQuad - 1) / kQuad;
    stages = quads > 0 ? int(__umulhi(quads + round - 1, s.round_magic)) : 0;
    part = (stages + warps_per_set - 1) / warps_per_set * kStageTokens;
  }

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

  __device__ __forceinline__ int first_token(int own_stage) const {
    return (own_stage * s.cluster + rank) * s.stage.tokens;
  }
  __device__ __forceinline__ int token(int index) const {
    return first_token(index / kStageTokens) + index % kStageTokens;
  }
  __device__ __forceinline__ bool always_kept(int token) const {
    return token < p.num_sink_tokens || (token < plan.length && token >= plan.length - p.recent_window);
  }

  template <class T>
  __device__ __forceinline__ T* output(int head) const {
    return head_vector<T>(p.output, row, kv_head * p.group + head);
  }

  // Calls visit(four scores, first index, whether they exist) for the warp's run of its set's scores, in order, with
  // one token quad per lane and all lanes converged. Tokens that cannot be selected have score -inf.
  template <class Visit>
  __device__ __forceinline__ void each_quad(Visit visit) const {
    const int begin = sub * part, end = min(begin + part, stages * kStageTokens);
    const float* scores = m.scores + set * s.score_stride;
    if (set < sets)
      for (int i = begin; i < end; i += 32 * kQuad) {
        const int at = i + lane * kQuad;
        float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (at < end) x = *reinterpret_cast<const float4*>(scores + at);
        float quad[4] = {x.x, x.y, x.z, x.w};
        visit(quad, at, at < end && at % kStageTokens < s.stage.tokens);
      }
  }
};

}  // namespace adamas
