// Exact top-k by radix selection over (score, token): every value is distinct, so the k-th best is
// one value, and equal scores go to the most recent token.
#pragma once
#include "sm90/common.cuh"
#include "sm90/sample.h"

namespace adamas {

constexpr int kBinBits = 9;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinWords = spread(kBins);  // bins lie spread in shared memory
constexpr int kSelectWords = kBinWords + 32;

struct Bin {
  uint32_t index, before, size;  // before: the values in higher bins
};

// The bin that holds the `need`-th best value, by one warp; size 0 if there are fewer values.
template <int kBits>
__device__ __forceinline__ Bin find_bin(const uint32_t* bins, uint32_t need) {
  constexpr int kPerLane = (1 << kBits) / 32;
  const int lane = threadIdx.x % 32;
  const int top = (1 << kBits) - 1 - lane * kPerLane;  // lane 0 holds the highest bins
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) own += bins[spread(top - i)];
  uint32_t sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFull, sum, step);
    if (lane >= step) sum += other;
  }
  const unsigned reached = __ballot_sync(kFull, sum >= need);
  if (!reached) return {0, 0, 0};
  const int owner = __ffs(reached) - 1;
  uint32_t before = sum - own, bin = 0, size = 0;
  if (lane == owner)
    for (int i = 0; i < kPerLane; ++i) {
      bin = top - i, size = bins[spread(bin)];
      if (before + size >= need) break;
      before += size;
    }
  return {__shfl_sync(kFull, bin, owner), __shfl_sync(kFull, before, owner), __shfl_sync(kFull, size, owner)};
}

// The value at or above which there are `need` values, or at most `slack` more; by one warp, `kBits` bits per
// pass. each(visit) shows every value below 2^bits to visit, in any order and any spread over the lanes.
template <int kBits, class Each>
__device__ uint64_t warp_threshold(uint32_t* bins, int bits, uint32_t need, uint32_t slack, Each each) {
  const int lane = threadIdx.x % 32;
  uint64_t prefix = 0;
  for (int shift = bits;;) {
    const int width = min(kBits, shift), above = shift;
    shift -= width;
    __syncwarp();  // the bins were read
    for (int i = lane; i < spread(1 << kBits); i += 32) bins[i] = 0;
    __syncwarp();
    each([&](uint64_t v) {
      if (v >> above == prefix) atomicAdd(&bins[spread(uint32_t(v >> shift) & ((1u << width) - 1))], 1u);
    });
    __syncwarp();
    const Bin found = find_bin<kBits>(bins, need);
    const uint32_t size = found.size;
    need -= found.before;
    prefix = prefix << width | found.index;
    if (size - need <= slack || shift == 0) return prefix << shift;
  }
}

// The bin of kBins that holds the `need`-th best value, by a block; there have to be so many values.
// `bins` holds kSelectWords. Starts and ends synchronised.
template <int kThreads>
__device__ __forceinline__ Bin find_block_bin(uint32_t* bins, uint32_t need) {
  constexpr int kPerThread = kBins / kThreads, kWarps = kThreads / 32;
  static_assert(kPerThread * kThreads == kBins && kWarps <= 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* warp_sums = bins + kBinWords;
  uint32_t* found = warp_sums + kWarps;
  const int top = kBins - 1 - threadIdx.x * kPerThread;  // thread 0 holds the highest bins
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) own += bins[spread(top - i)];
  uint32_t sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFull, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w < warp) sum += warp_sums[w];
  if (sum >= need && sum - own < need) {  // one thread
    uint32_t before = sum - own;
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t size = bins[spread(top - i)];
      if (before + size >= need) {
        found[0] = top - i, found[1] = before, found[2] = size;
        break;
      }
      before += size;
    }
  }
  __syncthreads();
  return {found[0], found[1], found[2]};
}

// The same as warp_threshold, exact, by a block. Starts synchronised, and so it ends.
template <int kThreads, class Each>
__device__ uint64_t block_threshold(uint32_t* bins, int bits, uint32_t need, Each each) {
  uint64_t prefix = 0;
  for (int shift = bits;;) {
    const int width = min(kBinBits, shift), above = shift;
    shift -= width;
    for (int i = threadIdx.x; i < kBinWords; i += kThreads) bins[i] = 0;
    __syncthreads();
    each([&](uint64_t v) {
      if (v >> above == prefix) atomicAdd(&bins[spread(uint32_t(v >> shift) & ((1u << width) - 1))], 1u);
    });
    __syncthreads();
    const Bin found = find_block_bin<kThreads>(bins, need);
    need -= found.before;
    prefix = prefix << width | found.index;
    if (found.size == need || shift == 0) return prefix << shift;
    __syncthreads();
  }
}

__device__ __forceinline__ int token_bits(int length) { return 32 - __clz(length); }

__device__ __forceinline__ uint64_t ranked(uint32_t key, uint32_t token, int bits) {
  return uint64_t(key) << bits | token;
}

// A bitmap in shared memory lies spread.
__device__ __forceinline__ void set_bit(uint32_t* bitmap, uint32_t token) {
  atomicOr(bitmap + spread(token / 32), 1u << token % 32);
}

__host__ __device__ inline int bitmap_words(int length) { return spread((length + 31) / 32) + 1; }

// The set bits of a bitmap, ascending: visit(rank, token). `sums`: kThreads / 32 words. Returns how
// many bits are set. The caller synchronises before it uses what visit() wrote.
template <int kThreads, class Visit>
__device__ int each_set_bit(const uint32_t* bitmap, int words, uint32_t* sums, Visit visit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_thread = (words + kThreads - 1) / kThreads;
  const int begin = min(words, int(threadIdx.x) * per_thread), end = min(words, begin + per_thread);
  int own = 0;
  for (int w = begin; w < end; ++w) own += __popc(bitmap[spread(w)]);
  int sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFull, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) sum += sums[w];
    total += sums[w];
  }
  int rank = sum - own;
  for (int w = begin; w < end; ++w)
    for (uint32_t bits = bitmap[spread(w)]; bits; bits &= bits - 1) visit(rank++, w * 32 + __ffs(bits) - 1);
  return total;
}

}  // namespace adamas
