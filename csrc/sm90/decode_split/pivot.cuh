// The pivot of a token set: a score that ranks well below the k-th best, found in a sample of the context in shared
// memory.
//
// The block counts the sample's scores in bins; one warp per set takes the bin of the wanted rank. If too many scores
// share it, as equal ones do, that warp searches by value: each guess costs a pass over the sample and bounds the pivot
// by scores of the sample, so that outliers and equal scores do not prolong the search.
#pragma once
#include "sm90/decode_split/bins.cuh"
#include "sm90/histogram.cuh"
#include "sm90/memory.cuh"
#include "sm90/order.cuh"
#include "sm90/reduce.cuh"
#include "sm90/sample.h"
#include "sm90/signature.cuh"

namespace adamas {

constexpr int kNormalTries = 4;  // guesses that take the scores as normally distributed

// Candidates are tokens with a better score, and tokens with an equal score from `position` in the sample on.
struct Pivot {
  float score;
  float scale;  // selection bins per unit of score above the pivot, or 0 if all scores there are equal
  int position;
};

// The sample's scores in order; excluded tokens are -inf. Tiles of kTile neighbours are neighbours in the context.
struct Sample {
  const float* scores;
  int bits;  // log2 of their number
  __device__ __forceinline__ int size() const { return 1 << bits; }

  // Calls visit(score, position) for every score, four neighbours per lane.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 4
    for (int i = threadIdx.x % 32 * 4; i < size(); i += 128) {
      const float4 x = *reinterpret_cast<const float4*>(scores + i);
      visit(x.x, i), visit(x.y, i + 1), visit(x.z, i + 2), visit(x.w, i + 3);
    }
  }
};

// The search for the `rank`-th best score. `low` and `high` are scores of the sample: at least `rank` scores reach low,
// and fewer are better than high.
struct PivotSearch {
  float low, high;
  int reached, better;   // scores that reach low, and scores better than high
  float mean, deviation, inverse;  // of the sample: mean and standard deviation, 1 / number of scores

  __device__ __forceinline__ explicit PivotSearch(const Sample& sample) : better(0) {
    float sum = 0, squares = 0, least = INFINITY, most = -INFINITY;
    int seen = 0;
    sample.each([&](float x, int) {
      const bool here = x > -INFINITY;
      seen += here;
      sum += here ? x : 0.0f;
      squares += here ? x * x : 0.0f;
      least = fminf(least, here ? x : INFINITY);
      most = fmaxf(most, x);
    });
    reached = __reduce_add_sync(kFull, seen);
#pragma unroll
    for (int step = 16; step; step /= 2) {
      sum += __shfl_xor_sync(kFull, sum, step);
      squares += __shfl_xor_sync(kFull, squares, step);
      least = fminf(least, __shfl_xor_sync(kFull, least, step));
      most = fmaxf(most, __shfl_xor_sync(kFull, most, step));
    }
    low = least, high = most;
    inverse = __fdividef(1.0f, reached);
    mean = sum * inverse;
    deviation = sqrtf(fmaxf(squares * inverse - mean * mean, 0.0f));
  }

  // A score that `rank` to rank + slack scores reach. If there is none, low and high end at the score whose equals
  // include both ranks.
  __device__ __forceinline__ float find(const Sample& sample, int rank, int slack) {
    const float share = (rank + 0.4f * slack) * inverse;
    float guess = mean + deviation * (share < 0.5f ? normal_tail(share) : 0.0f);
#pragma unroll 1
    for (int i = 0; reached > rank + slack && low < high; ++i) {
      // Any value in (low, high] makes progress. Halves of the range of the floats serve scores of any magnitude.
      if (!(guess > low && guess <= high)) guess = i % 2 ? low + 0.5f * (high - low) : middle_key();
      if (!(guess > low && guess <= high)) guess = high;
      int count = 0;
      float above = INFINITY, below = -INFINITY;
      sample.each([&](float x, int) {
        const bool reaches = x >= guess;
        count += reaches;
        above = fminf(above, reaches ? x : INFINITY);
        below = fmaxf(below, reaches ? -INFINITY : x);
      });
      count = __reduce_add_sync(kFull, count);
      if (count >= rank) {
        low = from_order_key(__reduce_min_sync(kFull, order_key(above)));
        reached = count;
      } else {
        high = from_order_key(__reduce_max_sync(kFull, order_key(below)));
        better = count;
      }
      const float found = count * inverse;
      guess = i < kNormalTries && share < 0.5f && count && found < 0.5f
                  ? mean + (guess - mean) * __fdividef(normal_tail(share), normal_tail(found))
                  : NAN;
    }
    return low;
  }

 private:
  __device__ __forceinline__ float middle_key() const {
    return from_order_key(order_key(low) + (order_key(high) - order_key(low) + 1) / 2);
  }
};

// The last position from which on `count` scores equal `value`, to a multiple of 4.
inline __device__ __noinline__ int find_position(const Sample& sample, float value, int count) {
  for (int base = sample.size() - 128;; base -= 128) {
    const int at = base + threadIdx.x % 32 * 4;
    const float4 x = *reinterpret_cast<const float4*>(sample.scores + max(at, 0));
    const int own = at < 0 ? 0 : (x.x == value) + (x.y == value) + (x.z == value) + (x.w == value);
    const int before = warp_prefix_sum(own) - own, total = __reduce_add_sync(kFull, own);
    const uint32_t enough = __ballot_sync(kFull, total - before >= count);
    if (enough) return max(base + (31 - __clz(enough)) * 4, 0);
    if (base <= 0) return 0;
    count -= total;
  }
}

// The scores that reach the pivot: how they gather in tiles (the variance of a tile's number over its mean, 1 for
// independent scores), and by how much they exceed it on average.
struct Reaching {
  float spread, excess;
  __device__ __forceinline__ Reaching(const Sample& sample, float pivot, int reached) {
    float sum = 0;
    int squares = 0;
#pragma unroll 2
    for (int base = 0; base < sample.size(); base += 128) {  // 8 tiles, four lanes each
      const float4 x = *reinterpret_cast<const float4*>(sample.scores + base + threadIdx.x % 32 * 4);
      int count = 0;
      auto add = [&](float score) {
        count += score >= pivot;
        sum += score >= pivot ? score - pivot : 0.0f;
      };
      add(x.x), add(x.y), add(x.z), add(x.w);
      count += __shfl_xor_sync(kFull, count, 1);
      count += __shfl_xor_sync(kFull, count, 2);
      squares += count * count;
    }
    const float number = float(reached);
    spread = __fdividef(0.25f * __reduce_add_sync(kFull, squares), number) - number * kTile / sample.size();
    excess = __fdividef(warp_sum(sum), number);
  }
};
static_assert(kTile == 4 * kQuad);

// A sample's sums and its scores in bins, in shared memory.
struct alignas(16) SampleCounts {
  uint32_t bins[kSampleBins];
  float sum, squares;
  uint32_t count;
};

// Sums up the samples of `sets` token sets, whose scores follow each other, by a block. counts: zeroed. Starts and ends
// synchronised.
__device__ __forceinline__ void count_samples(const Sample& sample, int sets, float share, SampleCounts* counts) {
  const int per_set = sample.size() / kQuad, all = sets * per_set;  // a warp's quads belong to one set
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    const float4 x = *reinterpret_cast<const float4*>(sample.scores + i * kQuad);
    float sum = 0, squares = 0;
    int count = 0;
    auto add = [&](float score) {
      const bool here = score > -INFINITY;
      sum += here ? score : 0.0f, squares += here ? score * score : 0.0f, count += here;
    };
    add(x.x), add(x.y), add(x.z), add(x.w);
    sum = warp_sum(sum), squares = warp_sum(squares), count = __reduce_add_sync(kFull, count);
    if (threadIdx.x % 32) continue;
    SampleCounts& to = counts[i / per_set];
    atomicAdd(&to.sum, sum), atomicAdd(&to.squares, squares), atomicAdd(&to.count, uint32_t(count));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    SampleCounts& to = counts[i / per_set];
    const ScoreBinning binning(to.sum, to.squares, float(to.count), share);
    const float4 x = *reinterpret_cast<const float4*>(sample.scores + i * kQuad);
    auto count = [&](float score) {
      const int bin = sample_bin(score, binning.low, binning.scale);
      if (bin > 0 && score > -INFINITY) atomicAdd(to.bins + bin, 1u);
    };
    count(x.x), count(x.y), count(x.z), count(x.w);
  }
  __syncthreads();
}

// The pivot for the `need` best of `length` tokens, by one warp. If the best scores of the sample gather in few tiles, as
// those of a passage do, their number says less about the context, so the pivot ranks lower.
__device__ __forceinline__ Pivot find_pivot(const Sample& sample, const SampleCounts& counts, float share, int need,
                                            int length) {
  const int least = sample_rank(need, sample.size(), length, kLeastSpread);
  if (int(counts.count) < least) return {-INFINITY, 0.0f, 0};
  const ScoreBinning binning(counts.sum, counts.squares, float(counts.count), share);
  const uint4 own = *reinterpret_cast<const uint4*>(counts.bins + kSampleBins - 4 * (threadIdx.x % 32 + 1));
  const uint32_t count[4] = {own.w, own.z, own.y, own.x};  // a lane's bins in descending order
  // The score that a rank's bin begins with, and how many scores of the sample reach it.
  auto bin_of = [&](int rank, int& reached) {
    const LaneBin found = find_lane_bin(count, uint32_t(rank));
    const int owner = __ffs(__ballot_sync(kFull, found.sum >= uint32_t(rank))) - 1;
    reached = owner < 0 ? INT_MAX : __shfl_sync(kFull, int(found.bin.before + found.bin.size), owner);
    return bin_floor(__shfl_sync(kFull, int(found.bin.index), max(owner, 0)), binning.low, binning.deviation);
  };
  int rank = least, reached;  // up to half as many again do no harm, as long as the candidates fit
  float score = bin_of(rank, reached), excess = 0;
  if (reached <= rank + rank / 2) {
    const Reaching reaching(sample, score, reached);
    const int wanted =
        min(sample_rank(need, sample.size(), length, fminf(reaching.spread, kMostSpread)), sample.size() * 3 / 4);
    excess = reaching.excess + score;
    if (wanted > reached && wanted <= int(counts.count)) rank = wanted, score = bin_of(rank, reached);
    excess -= score;
  }
  if (reached > rank + rank / 2) {
    PivotSearch search(sample);
    score = search.find(sample, rank, rank / 2);
    if (search.reached > rank + rank / 2)  // equal scores: the most recent ones are candidates
      return {score, 0.0f, find_position(sample, score, rank - search.better)};
    excess = Reaching(sample, score, search.reached).excess;
  }
  // The k-th best is above the pivot by a few times the mean excess; better scores share the last bin.
  return {score, excess > 0 ? __fdividef(kBins, 6.0f * excess) : 0.0f, 0};
}

}  // namespace adamas
