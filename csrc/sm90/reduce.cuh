// Reductions and prefix sums over the lanes of a warp, by shuffles, and over the threads of a block. All lanes or
// threads call them.
#pragma once
#include <cuda_runtime.h>

namespace adamas {

constexpr unsigned kFull = 0xffffffffu;  // every lane of a warp

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(kFull, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, step));
  return x;
}

// Inclusive prefix sum over the lanes that are congruent modulo kStride.
template <int kStride = 1, class T>
__device__ __forceinline__ T warp_prefix_sum(T x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = kStride; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kFull, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Inclusive prefix sum over the threads of a block, and the total. `sums`: kThreads / 32 elements of shared memory.
// Has one barrier; the caller synchronises before `sums` is written again.
template <class T>
struct BlockSum {
  T prefix, total;
};
template <int kThreads, class T>
__device__ __forceinline__ BlockSum<T> block_prefix_sum(T x, T* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = warp_prefix_sum(x), total = 0;
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) sum += sums[w];
    total += sums[w];
  }
  return {sum, total};
}

}  // namespace adamas
