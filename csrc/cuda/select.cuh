// Exact top-k by radix selection over (score, token): every value is distinct, so the k-th best is
// one value, and equal scores go to the most recent token.
#pragma once
#include "common.cuh"

namespace adamas {

constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;

struct Threshold {
  uint64_t value;   // the selected are those at or above it
  uint32_t excess;  // how many more than asked for there are
};

// One warp, `kBits` bits per pass. each(visit) shows every value below 2^bits to visit, in any
// order and any spread over the lanes. At most `slack` more than `need` values are selected.
template <int kBits, class Each>
__device__ Threshold warp_threshold(uint32_t* bins, int bits, uint32_t need, uint32_t slack, Each each) {
  constexpr int kPerLane = (1 << kBits) / 32;
  const int lane = threadIdx.x % 32;
  uint64_t prefix = 0;
  for (int shift = bits;;) {
    const int width = min(kBits, shift), above = shift;
    shift -= width;
    for (int i = lane; i < 1 << kBits; i += 32) bins[i] = 0;
    __syncwarp();
    each([&](uint64_t v) {
      if (v >> above == prefix) atomicAdd(&bins[uint32_t(v >> shift) & ((1u << width) - 1)], 1u);
    });
    __syncwarp();
    // Lane 0 holds the highest bins.
    uint32_t own = 0;
    const int top = (1 << kBits) - 1 - lane * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) own += bins[top - i];
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFull, sum, step);
      if (lane >= step) sum += other;
    }
    const int owner = __ffs(__ballot_sync(kFull, sum >= need)) - 1;
    uint32_t before = sum - own, bin = 0, size = 0;
    if (lane == owner)
      for (int i = 0; i < kPerLane; ++i) {
        bin = top - i, size = bins[bin];
        if (before + size >= need) break;
        before += size;
      }
    before = __shfl_sync(kFull, before, owner);
    bin = __shfl_sync(kFull, bin, owner);
    size = __shfl_sync(kFull, size, owner);
    need -= before;
    prefix = prefix << width | bin;
    if (size - need <= slack || shift == 0) return {prefix << shift, size - need};
    __syncwarp();
  }
}

// The same by a block of kThreads threads; `bins` holds kBins + 32 words.
template <int kThreads, class Each>
__device__ Threshold block_threshold(uint32_t* bins, int bits, uint32_t need, Each each) {
  constexpr int kPerThread = kBins / kThreads, kWarps = kThreads / 32;
  static_assert(kPerThread * kThreads == kBins && kWarps <= 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* warp_sums = bins + kBins;
  uint32_t* found = warp_sums + kWarps;
  uint64_t prefix = 0;
  for (int shift = bits;;) {
    const int width = min(kBinBits, shift), above = shift;
    shift -= width;
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    each([&](uint64_t v) {
      if (v >> above == prefix) atomicAdd(&bins[uint32_t(v >> shift) & ((1u << width) - 1)], 1u);
    });
    __syncthreads();
    const int top = kBins - 1 - threadIdx.x * kPerThread;  // thread 0 holds the highest bins
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) own += bins[top - i];
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
        const uint32_t size = bins[top - i];
        if (before + size >= need) {
          found[0] = top - i, found[1] = before, found[2] = size;
          break;
        }
        before += size;
      }
    }
    __syncthreads();
    need -= found[1];
    prefix = prefix << width | found[0];
    const uint32_t size = found[2];
    if (size == need || shift == 0) return {prefix << shift, size - need};
    __syncthreads();
  }
}

__device__ __forceinline__ int token_bits(int length) { return 32 - __clz(length); }

__device__ __forceinline__ uint64_t ranked(uint32_t key, uint32_t token, int bits) {
  return uint64_t(key) << bits | token;
}

// Bits [first, last) of a bitmap in shared memory; whole words are stored, so no other bits may be
// set before. Call with every thread.
__device__ __forceinline__ uint32_t range_bits(int word, int first, int last) {
  const int low = max(first - word * 32, 0), high = min(last - word * 32, 32);
  if (low >= high) return 0;
  return (high == 32 ? kFull : (1u << high) - 1) & ~((1u << low) - 1);
}

// The set bits of a bitmap, ascending: visit(rank, token). `sums`: kThreads / 32 words. Returns how
// many bits are set. The caller synchronises before it uses what visit() wrote.
template <int kThreads, class Visit>
__device__ int each_set_bit(const uint32_t* bitmap, int words, uint32_t* sums, Visit visit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_thread = (words + kThreads - 1) / kThreads;
  const int begin = min(words, int(threadIdx.x) * per_thread), end = min(words, begin + per_thread);
  int own = 0;
  for (int w = begin; w < end; ++w) own += __popc(bitmap[w]);
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
    for (uint32_t bits = bitmap[w]; bits; bits &= bits - 1) visit(rank++, w * 32 + __ffs(bits) - 1);
  return total;
}

}  // namespace adamas
