// The range of scores over which the bins of the search for the k-th best lie: guessed from a sample before the tokens
// are scored, or found in the lists by an exchange between the blocks.
#pragma once
#include <cfloat>
#include <climits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/decode_fused/list.cuh"
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"
#include "sm90/sample.h"

namespace adamas {

// The fine bins span [low, low + reach]. There are no bins, and the search is exact, if that is no range.
__device__ __forceinline__ void begin_search(const FusedBlock& b, int wanted, uint32_t low_key, uint32_t best,
                                             float reach) {
  FusedSearch& search = b.m.search;
  const float low = low_key ? from_order_key(low_key) : -FLT_MAX, scale = __fdividef(kFineBins, reach);
  search.low = low;
  search.exact = !(low > -FLT_MAX && low_key < best && scale > 0.0f && scale < 3e38f);
  search.scale = search.exact ? 0.0f : scale;
  search.size = INT_MAX, search.wanted = wanted;
  const int bits = token_bits(b.plan.length);
  search.from = uint64_t(order_key(low)) << bits;
  search.to = uint64_t(best) << bits | (b.plan.length - 1);
  search.failed = search.exact;
}

// -- from the sample, with combine=max: every block has scored the same one --

__device__ __forceinline__ void count_sampled(const FusedBlock& b, float score) {
  const int bin = int((score - kSampledLow) / kSampledWidth);
  atomicAdd(b.m.sampled + min(max(bin, 0), kSampledBins - 1), 1u);
}

// The low end has a rank in the sample that is six standard deviations below the expected one of the k-th best
// (sample_rank, with twice the spread of encode's sample, whose tiles are more), and the fine bins span a multiple of the
// distance between the two. `enough` says whether the sample tells them apart; if not, there is no guess. One warp calls it.
__device__ __forceinline__ void guess_range(const FusedBlock& b, int wanted) {
  constexpr float kReach = 3.0f;
  constexpr int kLeastRank = 8;  // a lower one would be that of a few outliers
  const int lane = b.lane, tokens = min(kSampleTiles * kTile, b.plan.length);
  const uint32_t rank = max(int(__fdividef(float(wanted) * tokens, b.plan.length)), kLeastRank);
  const uint32_t low_rank = sample_rank(max(wanted, 1), tokens, b.plan.length, 2.0f * kMostSpread);
  constexpr int kPerLane = kSampledBins / 32;
  uint32_t count[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) count[i] = b.m.sampled[kSampledBins - 1 - kPerLane * lane - i];
  const LaneSums<kPerLane> sums(count);
  const LaneBin low = find_lane_bin(count, sums, low_rank), high = find_lane_bin(count, sums, rank);
  const uint32_t low_owner = __ballot_sync(kFull, low.owned(low_rank)), owner = __ballot_sync(kFull, high.owned(rank));
  const int from = __shfl_sync(kFull, int(low.bin.index), (__ffs(low_owner) - 1) & 31);
  const int to = __shfl_sync(kFull, int(high.bin.index), (__ffs(owner) - 1) & 31);
  if (lane == 0) {
    begin_search(b, wanted, order_key(kSampledLow + from * kSampledWidth), order_key(FLT_MAX),
                 kReach * (to + 1 - from) * kSampledWidth);
    b.m.search.enough = low_owner && 0 < from && from < to && to < kSampledBins - 1;
  }
}

// -- from the lists --

// Merges the range of the warp's listed scores into the block's range: the best one, a floor, the higher one of the floor
// and of a score that a quarter of 64 groups reach, and the list's pivot.
//
// The scores are divided into groups. The floor is the smallest of the groups' maxima, so each group has at least one
// score at or above it. If there are at least as many groups as tokens wanted, no token below the floor is selected.
// Fewer groups give a higher floor: a group is the scores of several lanes, of one lane, or every other one of a lane.
__device__ __forceinline__ void merge_range(const FusedBlock& b, int wanted, const ListState& list) {
  const int lane = b.lane;
  const GroupTops<2> tops(b.m.scores + b.warp * kList, list.count);
  const float(&part)[2] = tops.top;
  const int warps = min(b.s.cluster * b.s.num_warps, b.plan.length / kStageTokens);
  int per_warp = 2;  // groups
  while (per_warp < 64 && per_warp * warps < wanted) per_warp *= 2;
  float top = fmaxf(part[0], part[1]), floor = INFINITY;
  int groups = 0;
  if (per_warp <= 32) {
    float x = top;
#pragma unroll
    for (int n = 16, step = 1; n >= 2; n /= 2, step *= 2)
      if (n >= per_warp) x = fmaxf(x, __shfl_xor_sync(kFull, x, step));
    if (x > -INFINITY) floor = x, groups = (lane & (32 / per_warp - 1)) == 0;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (part[i] > -INFINITY) floor = fminf(floor, part[i]), ++groups;
  }
  groups = __reduce_add_sync(kFull, groups);
  const uint32_t low = __reduce_min_sync(kFull, order_key(floor)), high = __reduce_max_sync(kFull, order_key(top));
  const uint32_t quarter = tops.reached_by(16);
  if (lane == 0 && groups) {
    FusedRange& to = b.m.search.range;
    atomicMax(&to.best, high);
    atomicMin(&to.floor, low);
    atomicAdd(&to.groups, uint32_t(groups));
    atomicMax(&to.high, max(low, quarter));
    atomicMax(&to.pivot, order_key(list.pivot));
  }
}

// The low end is a score that enough tokens reach. The fine bins span it to the best score, or to a few times the distance
// from there to the highest floor or quarter of a warp (merge_range), so that outliers do not stretch them. There are none
// if no low end is known, or if all scores that may be selected are equal.
__device__ __forceinline__ void find_range(const FusedBlock& b, int wanted, const ListState& list) {
  constexpr float kReach = 4.0f;
  const FusedMemory& m = b.m;
  merge_range(b, wanted, list);
  __syncthreads();
  if (int(threadIdx.x) < b.s.cluster) {
    const FusedRange& own = m.search.range;
    const uint32_t to = remote(m.ranges + b.rank, threadIdx.x);
    remote_store16(to, make_uint4(own.best, own.floor, own.groups, own.high));
    remote_store16(to + 16, make_uint4(own.pivot, 0, 0, 0));
  }
  cluster_sync();
  if (b.warp == 0) {  // one block per lane
    FusedRange range{0, kFull, 0, 0, 0};
    if (b.lane < b.s.cluster) range = m.ranges[b.lane];
    const uint32_t top = __reduce_max_sync(kFull, range.best), floor = __reduce_min_sync(kFull, range.floor);
    const uint32_t groups = __reduce_add_sync(kFull, range.groups), high = __reduce_max_sync(kFull, range.high);
    const uint32_t pivot = __reduce_max_sync(kFull, range.pivot);
    if (b.lane == 0) {
      const uint32_t bottom = max(pivot, groups >= uint32_t(wanted) ? floor : 0);
      const float low = bottom ? from_order_key(bottom) : -FLT_MAX, best = from_order_key(top);
      const float reach = high > bottom ? fminf(best - low, kReach * (from_order_key(high) - low)) : best - low;
      begin_search(b, wanted, bottom, top, reach);
    }
  }
  __syncthreads();
}

}  // namespace adamas
