// The pivot of a token set: a score that ranks well below the k-th best. One warp finds it in a sample of the context
// in shared memory. A guess costs one pass over the sample; there is no barrier of the block.
#pragma once
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"

namespace adamas {

constexpr int kPivotBits = 8, kPivotWords = padded(1 << kPivotBits);
constexpr int kTries = 8;  // guesses of a pivot's value

// The number of standard deviations above the mean that a share `p` < 0.5 of a normal distribution exceeds, with an
// error below 0.005 (Abramowitz and Stegun, 26.2.22).
__device__ __forceinline__ float normal_tail(float p) {
  const float t = sqrtf(-2.0f * __logf(p));
  return t - __fdividef(2.30753f + 0.27061f * t, 1.0f + 0.99229f * t + 0.04481f * t * t);
}

// Candidates are tokens with a better score, and tokens with an equal score from `position` in the sample on.
struct Pivot {
  float score, top;  // top: the best of the sample
  int position;
};

// Calls visit(score, position) for every score of a sample, four neighbours per lane.
template <class Visit>
__device__ __forceinline__ void each_sampled(const float* scores, int sample_bits, Visit visit) {
#pragma unroll 4
  for (int i = threadIdx.x % 32 * 4; i < 1 << sample_bits; i += 128) {
    const float4 x = *reinterpret_cast<const float4*>(scores + i);
    visit(x.x, i), visit(x.y, i + 1), visit(x.z, i + 2), visit(x.w, i + 3);
  }
}

// Among many equal scores, the position in the sample decides. Rare, hence not inlined.
inline __device__ __noinline__ uint64_t find_tied_pivot(const float* scores, int sample_bits, int rank, int slack,
                                                 uint32_t* bins) {
  return warp_threshold<kPivotBits>(bins, 32 + sample_bits, rank, slack, [&](auto visit) {
    each_sampled(scores, sample_bits, [&](float x, int i) {
      if (x > -INFINITY) visit(rank_key(order_key(x), i, sample_bits));
    });
  });
}

// A score that at least `rank` and at most 1.5 `rank` tokens of the sample reach (2 `rank` where scores tie). Excluded
// tokens are -inf. Scores are nearly normal, so the first guess mostly fits; otherwise it is corrected, then bisected.
__device__ __forceinline__ Pivot find_pivot(const float* scores, int sample_bits, int rank, uint32_t* bins) {
  const int slack = rank / 2;  // more candidates do no harm as long as they fit
  float sum = 0, squares = 0, low = INFINITY, high = -INFINITY;
  int seen = 0;
  each_sampled(scores, sample_bits, [&](float x, int) {
    const bool here = x > -INFINITY;
    seen += here;
    sum += here ? x : 0.0f;
    squares += here ? x * x : 0.0f;
    low = fminf(low, here ? x : INFINITY);
    high = fmaxf(high, x);
  });
  seen = __reduce_add_sync(kFull, seen);
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sum += __shfl_xor_sync(kFull, sum, step);
    squares += __shfl_xor_sync(kFull, squares, step);
    low = fminf(low, __shfl_xor_sync(kFull, low, step));
    high = fmaxf(high, __shfl_xor_sync(kFull, high, step));
  }
  if (seen < rank) return {-INFINITY, high, 0};
  int most = seen;  // tokens that reach low
  const float top = high, inverse = __fdividef(1.0f, seen), mean = sum * inverse;
  const float share = (rank + 0.4f * slack) * inverse;
  float guess = mean + sqrtf(fmaxf(squares * inverse - mean * mean, 0.0f)) * (share < 0.5f ? normal_tail(share) : 0.0f);
#pragma unroll 1
  for (int i = 0; i < kTries; ++i) {
    if (!(guess > low && guess < high)) guess = 0.5f * (low + high);
    int reached = 0;
    each_sampled(scores, sample_bits, [&](float x, int) { reached += x >= guess; });
    reached = __reduce_add_sync(kFull, reached);
    if (reached >= rank && reached <= rank + slack) return {guess, top, 0};
    (reached < rank ? high : low) = guess;
    if (reached >= rank) most = reached;
    const float found = reached * inverse;
    guess = i < 4 && share < 0.5f && reached && found < 0.5f
                ? mean + (guess - mean) * __fdividef(normal_tail(share), normal_tail(found))
                : NAN;  // bisect
  }
  if (most <= 2 * rank) return {low, top, 0};
  const uint64_t tied = find_tied_pivot(scores, sample_bits, rank, slack, bins);
  return {from_order_key(uint32_t(tied >> sample_bits)), top, int(tied & ((1 << sample_bits) - 1))};
}

}  // namespace adamas
