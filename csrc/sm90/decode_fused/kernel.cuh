// fused: a whole decode step of one (row, KV head) in one cluster of blocks, where all query heads of the KV head
// attend to one token set. It takes steps whose clusters run at once; three launches and their chains of dependent
// loads cost more than reading the data.
//
// A block scores its own tokens, and its warps list those that may be selected (score.cuh, list.cuh). Three exchanges
// give every block of the cluster the same threshold (threshold.cuh). Each block attends to its own tokens that reach
// it (attend.cuh), and the blocks that write the output merge the parts (merge.cuh). The step takes five cluster
// barriers, or four if the sample suggests a range; everything else is local to a block. A row that selects more than
// kMostWanted tokens takes several rounds: each selects among the tokens that rank below the threshold of the round
// before.
//
// In a model hundreds of megabytes of weights pass between two of these launches, so the instructions come from memory,
// as the data does, and nearly all of them run once. Code that seldom runs is therefore not inlined, and loops that rarely
// take a second turn are not unrolled.
#pragma once
#include "sm90/decode_fused/attend.cuh"
#include "sm90/decode_fused/merge.cuh"
#include "sm90/decode_fused/score.cuh"
#include "sm90/decode_fused/threshold.cuh"
#include "sm90/dense.cuh"

namespace adamas {

// Without a guess the lists give the range; returns how many of the warp's tokens are left. With combine=max a guess is
// the rule.
__device__ __forceinline__ int keep_in_range(const FusedBlock& b, int wanted, const ListState& list) {
  find_range(b, wanted, list);
  return keep_listed(b, list).count;
}
inline __device__ __noinline__ int keep_in_range_apart(const DecodeParams& p, const FusedShape& s, uint8_t* memory,
                                                       int wanted, ListState list) {
  return keep_in_range(FusedBlock(p, s, memory), wanted, list);
}

// Selects the tokens of a round and attends to them; the round ends with their threshold. Returns the number of tokens,
// which is 0 if the range was guessed and too few tokens reach its low end.
template <int D, Mode kMode, int kQuads, class Softmax>
__device__ __forceinline__ int attend_round(const FusedBlock& scored, uint8_t* memory, Round& round, RingPlace& place,
                                             Softmax& softmax) {
  const ListState list = list_own_tokens<D <= 128 ? 1 : 2, kMode, kQuads>(scored, round, place);
  const FusedBlock b(scored.p, scored.s, memory);  // again, so that no register holds it while tokens are scored
  const FusedSearch& search = b.m.search;
  if (round.number == 0) {
    cluster_wait();  // for the arrival at the kernel's start
    softmax.start(b.p, b.row, b.kv_head * b.p.group, b.p.group);
  }
  Listed listed(b, list.count);
  const bool guessed = kMode == Mode::dot_max && round.number == 0 && search.enough;  // all blocks agree, here and below
  if (kMode != Mode::dot_max) listed.count = keep_in_range(b, round.wanted, list);
  else if (!guessed) listed.count = keep_in_range_apart(b.p, b.s, memory, round.wanted, list);
  if (!search.failed) find_edge(b, listed);
  if (guessed && !search.enough) return 0;
  if (search.failed) narrow_edge(b.p, b.s, memory, listed.count);
  find_threshold(b, listed);
  attend_selected(b, listed, softmax);
  round.score = search.score, round.token = search.token;
  return round.wanted;
}

// The rounds after the first one, which has attended to `done` tokens. Not inlined, and the softmax state is passed by
// value, because the state would otherwise take registers while the first round's tokens are scored.
template <int D, Mode kMode, int kQuads, class Softmax>
__device__ __noinline__ Softmax attend_more_rounds(const DecodeParams& p, const FusedShape& s, uint8_t* memory,
                                                   Round round, RingPlace place, int done, Softmax softmax) {
  const FusedBlock b(p, s, memory);
  if (done == 0 && threadIdx.x == 0 && b.rank == 0) count_search(p);
  for (int left = b.plan.need - done; left > 0; left -= round.wanted) {
    async_copies_follow();
    __syncthreads();  // every warp has read the tokens and the threshold of the round before
    reset_round(b);
    __syncthreads();
    ++round.number, round.wanted = min(left, kMostWanted);
    attend_round<D, kMode, kQuads>(b, memory, round, place, softmax);
  }
  return softmax;
}

// The sinks and the recent window, which few configurations have.
template <class Softmax>
__device__ __noinline__ Softmax attend_ends(const DecodeParams& p, const FusedShape& s, uint8_t* memory,
                                            Softmax softmax) {
  const FusedBlock b(p, s, memory);
  attend_range(b, 0, p.num_sink_tokens, softmax);
  attend_range(b, p.num_sink_tokens + b.plan.middle, b.plan.length, softmax);
  if (threadIdx.x == 0) b.m.search.active = s.num_warps;
  return softmax;
}

// Every block works on the dense rows when it has finished its own row. Not inlined, because dense rows are rare in these
// steps.
template <class T, class Softmax>
__device__ __noinline__ void share_dense_rows(const DecodeParams& p, int worker, int workers, uint8_t* memory) {
  attend_dense<T, Softmax>(p, worker, workers, memory, blockDim.x / 32);
}

template <int D, class T, bool kFp8, Mode kMode, int kQuads>
__global__ void __launch_bounds__(kMostWarps * 32)
    fused_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ FusedShape s) {
  extern __shared__ __align__(16) uint8_t fused_memory[];
  using Softmax = Attention<D, T, 1, kFp8>;
  const FusedBlock b(p, s, fused_memory);
  if (threadIdx.x == 0) b.m.search.active = 0;
  cluster_arrive_relaxed();  // other blocks may write to this one only when it runs
  const bool any_dense = any_dense_row(p);
  if (threadIdx.x == 0) b.m.search.any_dense = any_dense;  // a register would be spilled
  if (b.plan.sparse) {
    Softmax softmax;
    if (b.plan.need > 0) {
      RingPlace place;
      Round round{0, min(b.plan.need, kMostWanted), INFINITY, INT_MAX};
      const int done = attend_round<D, kMode, kQuads>(b, fused_memory, round, place, softmax);
      if (done < b.plan.need)
        softmax = attend_more_rounds<D, kMode, kQuads>(p, s, fused_memory, round, place, done, softmax);
    } else {
      b.begin();
      cluster_wait();
      softmax.start(p, b.row, b.kv_head * p.group, p.group);
    }
    if (p.num_sink_tokens + p.recent_window > 0) softmax = attend_ends(p, s, fused_memory, softmax);
    merge_cluster<D, T>(FusedBlock(p, s, fused_memory), softmax);
  } else {
    b.begin();
    if (b.plan.length <= 0)
      for (int i = threadIdx.x; b.rank == 0 && i < p.group * D; i += blockDim.x) {
        b.output<T>(i / D)[i % D] = T(0.0f);
        if (i % D == 0) store_lse(p, b.row, b.kv_head * p.group + i / D, -INFINITY, 0);
      }
    cluster_wait();
  }
  __syncthreads();
  if (!b.m.search.any_dense) return;
  const int worker = (b.row * p.page.num_kv_heads + b.kv_head) * s.cluster + b.rank;
  const int workers = min(p.dense_workers, p.num_rows * p.page.num_kv_heads * s.cluster);
  if (worker < workers) share_dense_rows<T, Softmax>(p, worker, workers, fused_memory);
}

// Launches the kernel, or with `count` returns the clusters that the device runs at once.
template <int D>
int fused_head_size(const DecodeParams& p, const FusedShape& s, void* stream, bool count) {
  int clusters = 0;
  auto launch_it = [&](auto element, auto mode, auto quads, auto fp8) {
    constexpr auto* kernel =
        fused_kernel<D, decltype(element), decltype(fp8)::value, decltype(mode)::value, decltype(quads)::value>;
    const dim3 grid(s.cluster, p.page.num_kv_heads, p.num_rows);
    if (count) clusters = count_clusters(kernel, s.cluster, s.num_warps * 32, s.bytes, "fused");
    else launch_clusters(kernel, grid, s.cluster, s.num_warps * 32, s.bytes, stream, p.overlap, "fused", p, s);
  };
  auto run = [&](auto element, auto mode, auto quads) {
    if (p.page.fp8()) launch_it(element, mode, quads, std::true_type());
    else launch_it(element, mode, quads, std::false_type());
  };
  auto by_mode = [&](auto element) {
    using std::integral_constant;
    using One = integral_constant<int, 1>;
    if (p.mode == Mode::manhattan_sum) return run(element, integral_constant<Mode, Mode::manhattan_sum>(), One());
    if (p.mode == Mode::dot) return run(element, integral_constant<Mode, Mode::dot>(), One());
    if (p.mode == Mode::manhattan) return run(element, integral_constant<Mode, Mode::manhattan>(), One());
    const integral_constant<Mode, Mode::dot_max> mode;
    if (p.head_quads == 1) return run(element, mode, One());
    run(element, mode, integral_constant<int, 2>());
  };
  if (p.query.element == Element::bf16) by_mode(__nv_bfloat16());
  else by_mode(__half());
  return clusters;
}

extern template int fused_head_size<64>(const DecodeParams&, const FusedShape&, void*, bool);
extern template int fused_head_size<128>(const DecodeParams&, const FusedShape&, void*, bool);

}  // namespace adamas
