// The k-th best of many values by histograms: the bin that holds it, and the number of values in higher bins.
//
// A search assigns the bins to threads in descending order, so that a prefix sum over the threads counts the
// values from the best one down. The thread whose sum first reaches k searches its own bins. Radix selection
// repeats this for every digit of the values, from the highest one down. For any distribution of values it ends
// after ceil(bits / digit) passes, each of which reads all values once.
#pragma once
#include "sm90/memory.cuh"
#include "sm90/reduce.cuh"

namespace adamas {

constexpr int kBinBits = 9;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinWords = padded(kBins);
// Scratch follows the bins: sums of up to 16 warps and the bin found, then kFreeWords for the caller.
constexpr int kScratchWords = 32, kFreeWord = kBinWords + 20, kFreeWords = 12;
constexpr int kHistogramWords = kBinWords + kScratchWords;

struct Bin {
  uint32_t index, before, size;  // before: values in higher bins
};

template <int kCount>
__device__ __forceinline__ uint32_t sum_bins(const uint32_t* bins, int top) {
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += bins[padded(top - i)];
  return sum;
}

// The bin of the `need`-th best value among kCount bins from `top` downwards; `before` values are in higher bins.
template <int kCount>
__device__ __forceinline__ Bin walk_bins(const uint32_t* bins, int top, uint32_t before, uint32_t need) {
  Bin bin{0, before, 0};
  for (int i = 0; i < kCount; ++i) {
    bin.index = top - i, bin.size = bins[padded(bin.index)];
    if (bin.before + bin.size >= need) break;
    bin.before += bin.size;
  }
  return bin;
}

// Search by a warp whose lanes hold the counts of 32 * kCount bins in registers: each lane kCount bins in descending
// order, lane 0 the highest ones. `bin` is the result in the lane that owns it: the values down to its last bin
// reach `need`, and those above its first bin do not.
struct LaneBin {
  Bin bin;
  uint32_t above, sum;  // values above the lane's bins, without and with its own
  __device__ __forceinline__ bool owned(uint32_t need) const { return sum >= need && above < need; }
};
template <int kCount>
struct LaneSums {
  uint32_t own = 0, sum;  // values of the lane's bins, and those with the bins above them

  __device__ __forceinline__ explicit LaneSums(const uint32_t (&count)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) own += count[i];
    sum = warp_prefix_sum(own);
  }
};
template <int kCount>
__device__ __forceinline__ LaneBin find_lane_bin(const uint32_t (&count)[kCount], const LaneSums<kCount>& sums,
                                                 uint32_t need) {
  uint32_t before = sums.sum - sums.own, size = count[0];
  int index = 32 * kCount - 1 - kCount * (threadIdx.x % 32);
#pragma unroll
  for (int i = 1; i < kCount; ++i)
    if (before + size < need) before += size, size = count[i], --index;
  return {{uint32_t(index), before, size}, sums.sum - sums.own, sums.sum};
}
template <int kCount>
__device__ __forceinline__ LaneBin find_lane_bin(const uint32_t (&count)[kCount], uint32_t need) {
  return find_lane_bin(count, LaneSums<kCount>(count), need);
}

// Search by a block: the bin of the `need`-th best value among kBins bins; at least that many values must exist.
// `bins`: kHistogramWords. Starts and ends synchronised.
template <int kThreads>
__device__ __forceinline__ Bin find_block_bin(uint32_t* bins, uint32_t need) {
  constexpr int kPerThread = kBins / kThreads, kWarps = kThreads / 32;
  static_assert(kPerThread * kThreads == kBins && kBinWords + kWarps + 3 <= kFreeWord);
  uint32_t* warp_sums = bins + kBinWords;
  uint32_t* found = warp_sums + kWarps;
  const int top = kBins - 1 - threadIdx.x * kPerThread;
  const uint32_t own = sum_bins<kPerThread>(bins, top);
  const uint32_t sum = block_prefix_sum<kThreads>(own, warp_sums).prefix;
  if (sum >= need && sum - own < need) {  // one thread
    const Bin bin = walk_bins<kPerThread>(bins, top, sum - own, need);
    found[0] = bin.index, found[1] = bin.before, found[2] = bin.size;
  }
  __syncthreads();
  return {found[0], found[1], found[2]};
}

// A pass of radix selection: bits [shift, above) of the values whose higher bits are `prefix`.
struct RadixDigit {
  uint64_t prefix;
  int above, shift;
  __device__ __forceinline__ bool has(uint64_t value) const { return value >> above == prefix; }
  __device__ __forceinline__ uint32_t operator()(uint64_t value) const {
    return uint32_t(value >> shift) & ((1u << (above - shift)) - 1);
  }
};

// Radix selection by a block without slack, kBinBits bits per pass. `bins`: kHistogramWords. Starts and ends
// synchronised.
template <int kThreads, class Each>
__device__ uint64_t block_threshold(uint32_t* bins, int bits, uint32_t need, Each each) {
  uint64_t prefix = 0;
  for (int shift = bits;;) {
    const int width = min(kBinBits, shift), above = shift;
    shift -= width;
    for (int i = threadIdx.x; i < kBinWords; i += kThreads) bins[i] = 0;
    __syncthreads();
    const RadixDigit digit{prefix, above, shift};
    each([&](uint64_t v) {
      if (digit.has(v)) atomicAdd(&bins[padded(digit(v))], 1u);
    });
    __syncthreads();
    const Bin found = find_block_bin<kThreads>(bins, need);
    need -= found.before;
    prefix = prefix << width | found.index;
    if (found.size == need || shift == 0) return prefix << shift;
    __syncthreads();  // every thread has read the bin found
  }
}

}  // namespace adamas
