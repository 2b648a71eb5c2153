// Queues of candidates of scan's lanes, so that one atomic on a set's counter serves many candidates.
//
// A lane has a queue in shared memory per head quad, for the set that it scores. A warp empties its queues of a head
// quad as soon as one of them might overflow; no other warp is involved.
#pragma once
#include "sm90/memory.cuh"
#include "sm90/params.h"
#include "sm90/reduce.cuh"

namespace adamas {

// Appends the lanes' queues of one head quad, [length][32], to the candidates of their sets. Lanes congruent modulo
// kStride have the same set; the last of them reserves the places for all.
template <int kStride>
__device__ __noinline__ void flush(const DecodeParams& p, const uint2* queue, int count, int set) {
  const int lane = threadIdx.x % 32;
  const int sum = warp_prefix_sum<kStride>(count);
  uint32_t at = 0;
  if (lane >= 32 - kStride && sum) at = atomicAdd(p.work.count + set, uint32_t(sum));
  at = __shfl_sync(kFull, at, 32 - kStride + lane % kStride) + sum - count;
  for (int i = 0; i < count; ++i)
    if (at + i < uint32_t(p.capacity)) p.work.candidates[int64_t(set) * p.capacity + at + i] = queue[i * 32 + lane];
}

// A KV head's token sets of the rows that scan scores together: `count` sets, whose numbers are `stride` apart.
struct TokenSets {
  int first, count, stride;
  __device__ __forceinline__ int operator()(int i) const { return first + min(i, count - 1) * stride; }
};

template <int kQuads, int kLength, int kStride>
struct CandidateQueues {
  static constexpr int kEntryBytes = 32 * int(sizeof(uint2));  // distance between entries of a lane

  const uint2* memory;  // [head quad][kLength][32]
  const int lane;
  const TokenSets sets;
  uint32_t start;         // shared address of the lane's first queue
  uint32_t tail[kQuads];  // shared address of a queue's end

  __device__ CandidateQueues(const uint2* memory, int lane, const TokenSets& sets)
      : memory(memory), lane(lane), sets(sets), start(shared_address(memory) + lane * 8) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) tail[q] = head(q);
  }

  __device__ __forceinline__ uint32_t head(int q) const { return start + q * (kLength * kEntryBytes); }

  // Appends a token if its score is above the limit. In assembly, because the compiler would branch around the store.
  __device__ __forceinline__ void push(int q, float score, float limit, uint32_t token) {
    asm volatile(
        "{ .reg .pred p; setp.gt.f32 p, %1, %2; @p st.shared.v2.b32 [%0], {%3, %4}; @p add.u32 %0, %0, 256; }"
        : "+r"(tail[q])
        : "f"(score), "f"(limit), "r"(__float_as_uint(score)), "r"(token)
        : "memory");
  }

  // Makes room for four more entries in every lane.
  __device__ __forceinline__ void make_room(const DecodeParams& p, int q) {
    if (__any_sync(kFull, tail[q] > head(q) + (kLength - 4) * kEntryBytes)) empty(p, q);
  }

  __device__ __forceinline__ void flush_all(const DecodeParams& p) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      if (__any_sync(kFull, tail[q] > head(q))) empty(p, q);
  }

 private:
  __device__ __forceinline__ void empty(const DecodeParams& p, int q) {
    // A lane past the last set has an empty queue and uses the last one.
    flush<kStride>(p, memory + q * kLength * 32, int(tail[q] - head(q)) / kEntryBytes, sets(q * kStride + lane % kStride));
    tail[q] = head(q);
  }
};

}  // namespace adamas
