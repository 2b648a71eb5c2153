// The candidates of a token set, and the selection of the k best among them by a block of attend.
//
// Scores above the pivot are divided into kBins equal bins, the last of which holds all better ones as well. One pass over the candidates fills the bins. A second one
// selects the candidates above the bin of the k-th best and collects the few members of that bin, which are ranked one
// by one. A thread reads only candidates that it copied to shared memory itself, so the copies need no barrier.
#pragma once
#include "sm90/bitmap.cuh"
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"
#include "sm90/rows.cuh"
#include "sm90/sample.h"

namespace adamas {

constexpr int kEdgeMembers = 128;  // most members of the k-th best's bin that are ranked one by one

// The first kKept candidates of a set are in shared memory, after the histogram. Any others are read from global
// memory each time.
template <int kThreads, int kKept>
struct CandidateList {
  const uint2* from;
  uint2* kept;

  __device__ CandidateList(const DecodeParams& p, int set, uint32_t* bins)
      : from(p.work.candidates + int64_t(set) * p.capacity), kept(reinterpret_cast<uint2*>(bins + kHistogramWords)) {}

  // Candidates to fetch before their number is known: slightly more than encode aims at.
  static __device__ __forceinline__ int expected(const DecodeParams& p, const RowPlan& plan) {
    const int bits = sample_bits(plan.length, p.sample_bits);
    const int64_t aim = int64_t(sample_rank(plan.need, 1 << bits, plan.length, kLeastSpread)) * plan.length * 5 / 4 >> bits;
    return (min(int(aim), kKept) + kThreads - 1) / kThreads * kThreads;
  }

  __device__ __forceinline__ void fetch(int begin, int end) const {
#pragma unroll 4
    for (int i = begin + int(threadIdx.x); i < end; i += kThreads) copy_async8(shared_address(kept + i), from + i);
  }

  // Calls visit(score, token) for each candidate, in one thread.
  template <class Visit>
  __device__ __forceinline__ void each(int count, Visit visit) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < min(count, kKept); i += kThreads) visit(__uint_as_float(kept[i].x), kept[i].y);
#pragma unroll 1
    for (int i = kKept + int(threadIdx.x); i < count; i += kThreads) {
      const uint2 x = from[i];
      visit(__uint_as_float(x.x), x.y);
    }
  }
};

// Maps a score to its bin, in equal steps above the pivot.
struct ScoreBins {
  float pivot, scale;
  __device__ __forceinline__ int operator()(float x) const {
    return scale > 0 ? min(int(fmaxf(x - pivot, 0.0f) * scale), kBins - 1) : 0;
  }
};

// Radix selection within one bin that has too many members. Keys are taken relative to the bin's lowest, so that only
// the bits of the tokens remain if all scores are equal. Rare, hence not inlined.
template <int kThreads, int kKept>
__device__ __noinline__ void select_in_bin(CandidateList<kThreads, kKept> candidates, int count, ScoreBins bin_at,
                                           int index, int wanted, int bits, uint32_t* bins, uint32_t* bitmap) {
  uint32_t* range = bins + kFreeWord;
  if (threadIdx.x == 0) range[0] = kFull, range[1] = 0;
  uint32_t least = kFull, most = 0;
  candidates.each(count, [&](float score, uint32_t) {
    if (bin_at(score) == index) least = min(least, order_key(score)), most = max(most, order_key(score));
  });
  least = __reduce_min_sync(kFull, least), most = __reduce_max_sync(kFull, most);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMin(range, least), atomicMax(range + 1, most);
  __syncthreads();
  const uint32_t low = range[0], high = range[1];
  auto members = [&](auto visit) {
    candidates.each(count, [&](float score, uint32_t token) {
      if (bin_at(score) == index) visit(rank_key(order_key(score) - low, token, bits), token);
    });
  };
  const uint64_t threshold =
      block_threshold<kThreads>(bins, 32 - __clz(high - low) + bits, wanted,
                                [&](auto visit) { members([&](uint64_t v, uint32_t) { visit(v); }); });
  members([&](uint64_t v, uint32_t token) {
    if (v >= threshold) set_bit(bitmap, token);
  });
}

// Sets the bits of the plan.need best of `count` candidates; there are at least that many. `bins`: kHistogramWords,
// zeroed and synchronised. The caller synchronises before it reads the bitmap.
template <int kThreads, int kKept>
__device__ __forceinline__ void select_candidates(const DecodeParams& p,
                                                  const CandidateList<kThreads, kKept>& candidates,
                                                  const RowPlan& plan, int count, const ScoreBins& bin_at,
                                                  uint32_t* bins, uint32_t* bitmap) {
  const int bits = token_bits(plan.length);
  if (bin_at.scale == 0)  // a single bin
    return select_in_bin(candidates, count, bin_at, 0, plan.need, bits, bins, bitmap);
  candidates.each(count, [&](float score, uint32_t) { atomicAdd(bins + padded(bin_at(score)), 1u); });
  __syncthreads();
  const Bin edge = find_block_bin<kThreads>(bins, plan.need);
  const int index = int(edge.index), wanted = int(plan.need - edge.before), size = int(edge.size);
  uint64_t* members = reinterpret_cast<uint64_t*>(bins);  // the counts are no longer needed
  uint32_t* num_members = bins + kFreeWord;
  if (threadIdx.x == 0) *num_members = 0;
  __syncthreads();
  candidates.each(count, [&](float score, uint32_t token) {
    const int bin = bin_at(score);
    if (bin > index || (bin == index && size == wanted)) set_bit(bitmap, token);
    else if (bin == index && size <= kEdgeMembers)
      members[atomicAdd(num_members, 1u)] = rank_key(order_key(score), token, bits);
  });
  if (size == wanted) return;
  __syncthreads();
  if (size > kEdgeMembers) {
    if (threadIdx.x == 0) count_search(p);
    return select_in_bin(candidates, count, bin_at, index, wanted, bits, bins, bitmap);
  }
  for (int m = threadIdx.x; m < size; m += kThreads) {
    const uint64_t mine = members[m];
    int better = 0;
    for (int i = 0; i < size; ++i) better += members[i] > mine;
    if (better < wanted) set_bit(bitmap, uint32_t(mine & ((1ull << bits) - 1)));
  }
}

}  // namespace adamas
