// fused: a whole decode step of one (row, KV head) in one cluster of blocks. It is for small batches, where three
// launches and their chains of dependent loads cost more than reading the data.
//
// A block scores its own tokens (score.cuh) and keeps the scores in shared memory. Three exchanges give every block
// of the cluster the same threshold (threshold.cuh). Each block attends to its own tokens that reach it
// (attend.cuh), and the blocks that write the output merge the parts (merge.cuh). The step takes five cluster
// barriers; everything else is local to a block.
#pragma once
#include "sm90/decode_fused/attend.cuh"
#include "sm90/decode_fused/merge.cuh"
#include "sm90/decode_fused/score.cuh"
#include "sm90/decode_fused/threshold.cuh"

namespace adamas {

template <int D, class T, bool kFp8, Mode kMode, int kQuads>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ FusedShape s) {
  extern __shared__ __align__(16) uint8_t fused_memory[];
  const FusedBlock b(p, s, fused_memory);
  cluster_arrive();  // other blocks may write to this one only when it runs
  if (b.plan.length <= 0) {
    b.begin();
    for (int i = threadIdx.x; b.rank == 0 && i < p.group * D; i += kFusedThreads) b.output<T>(i / D)[i % D] = T(0.0f);
    cluster_wait();
    return;
  }
  Attention<D, T, 1, kFp8> softmax;
  if (b.plan.sparse) {
    score_own_tokens<D <= 128 ? 1 : 2, kMode, kQuads>(b);
    find_range(b);
    const Candidates candidates(b);
    if (b.plan.need > 0) {  // all blocks agree on what they need
      if (!b.m.search_failed()) find_edge(b, candidates);
      if (b.m.search_failed()) narrow_edge(p, s, fused_memory);
    }
    find_threshold(b, candidates);
    attend_selected(b, candidates, softmax);
  } else {
    b.begin();
    cluster_wait();
    attend_all(b, softmax);
  }
  merge_cluster<D, T>(b, softmax);
}

// Launches the kernel, or with `count` returns the clusters that the device runs at once.
template <int D>
int fused_head_size(const DecodeParams& p, const FusedShape& s, void* stream, bool count) {
  int clusters = 0;
  auto launch_it = [&](auto element, auto mode, auto quads, auto fp8) {
    constexpr auto* kernel =
        fused_kernel<D, decltype(element), decltype(fp8)::value, decltype(mode)::value, decltype(quads)::value>;
    const dim3 grid(s.cluster, p.page.num_kv_heads, p.num_rows);
    if (count) clusters = count_clusters(kernel, s.cluster, kFusedThreads, s.bytes, "fused");
    else launch_clusters(kernel, grid, s.cluster, kFusedThreads, s.bytes, stream, p.overlap, "fused", p, s);
  };
  auto run = [&](auto element, auto mode, auto quads) {
    if (p.page.fp8()) launch_it(element, mode, quads, std::true_type());
    else launch_it(element, mode, quads, std::false_type());
  };
  auto by_mode = [&](auto element) {
    using std::integral_constant;
    using One = integral_constant<int, 1>;
    if (p.mode == Mode::manhattan_sum) return run(element, integral_constant<Mode, Mode::manhattan_sum>(), One());
    auto by_quads = [&](auto mode) {
      if (p.head_quads == 1) return run(element, mode, One());
      run(element, mode, integral_constant<int, 2>());
    };
    if (p.mode == Mode::dot_max) return by_quads(integral_constant<Mode, Mode::dot_max>());
    if (p.mode == Mode::dot) return by_quads(integral_constant<Mode, Mode::dot>());
    by_quads(integral_constant<Mode, Mode::manhattan>());
  };
  if (p.query.element == Element::bf16) by_mode(__nv_bfloat16());
  else by_mode(__half());
  return clusters;
}

extern template int fused_head_size<64>(const DecodeParams&, const FusedShape&, void*, bool);
extern template int fused_head_size<128>(const DecodeParams&, const FusedShape&, void*, bool);

}  // namespace adamas
