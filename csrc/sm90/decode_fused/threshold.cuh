// Stage 2 of the fused kernel: every block of the cluster finds the k-th best score and its token for each token set,
// in three exchanges through distributed shared memory.
//
//   1. the range of the scores                         find_range
//   2. a histogram over it, the bin of the k-th best   find_edge
//   3. the members of that edge bin, ranked            find_threshold
//
// A block writes its part to every block, so that each of them computes the same result locally; a cluster barrier
// ends each exchange. Tokens below the floor of the range cannot be selected, so warps list the others once
// (Candidates) and process nothing else. If the edge bin is too full for exchange 3, as with mostly equal scores, a
// radix search over the histograms of all blocks replaces it (radix_search).
#pragma once
#include <cfloat>
#include <climits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"

namespace adamas {

// -- exchange 1: the range --

__device__ __forceinline__ void find_range(const FusedBlock& b) {
  const FusedMemory& m = b.m;
  const int sets = b.sets;
  cluster_wait();  // for the arrival at the kernel's start: the other blocks run and accept stores
  if (b.lane < sets)
    for (int r = b.warp; r < b.s.cluster; r += kFusedWarps) {
      const auto& head = m.heads[b.lane];
      remote_store16(remote(m.ranges + b.rank * sets + b.lane, r),
                     make_uint4(head.floor, head.best, head.worst, head.groups));
    }
  cluster_sync();
  if (b.warp < sets) {  // one block per lane
    uint4 range = make_uint4(kFull, 0, kFull, 0);
    if (b.lane < b.s.cluster) range = m.ranges[b.lane * sets + b.warp];
    const uint32_t floor = __reduce_min_sync(kFull, range.x), top = __reduce_max_sync(kFull, range.y);
    const uint32_t bottom = __reduce_min_sync(kFull, range.z), groups = __reduce_add_sync(kFull, range.w);
    if (b.lane == 0) {
      auto& head = m.heads[b.warp];
      const float high = groups ? from_order_key(top) : 0.0f;
      head.low = groups ? from_order_key(groups >= uint32_t(b.plan.need) ? floor : bottom) : 0.0f;
      const float scale = high > head.low ? __fdividef(kEdgeBins - 1, high - head.low) : 0.0f;
      head.scale = scale < 3e38f ? scale : 0.0f;
    }
  }
  __syncthreads();
}

// A score's bin; it is monotonic in the score. Each operation is rounded separately, so that the compiler cannot
// contract them in one place and not in another.
__device__ __forceinline__ int edge_bin(float x, float low, float scale) {
  return min(int(__fmul_rn(__fsub_rn(x, low), scale)), kEdgeBins - 1);
}

// Tokens that a warp may have to select: those at or above the floor, and those that are always kept, with score inf.
// The order of the list depends on the scores alone. If the list cannot hold them all, each() passes over all scores
// again.
struct Candidates {
  const FusedBlock& b;
  int count;

  __device__ __forceinline__ explicit Candidates(const FusedBlock& b) : b(b) {
    const float low = b.set < b.sets ? b.m.heads[b.set].low : 0;
    const bool any_kept = b.p.num_sink_tokens + b.p.recent_window > 0;
    uint2* list = b.m.candidates + b.warp * kCandidates;
    int listed = 0;
    b.each_quad([&](float(&x)[4], int index, bool here) {
      const int first = any_kept ? b.token(index) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (any_kept && here && x[j] == -INFINITY && b.always_kept(first + j)) x[j] = INFINITY;
        const bool take = here && x[j] >= low && x[j] > -INFINITY;
        const uint32_t takers = __ballot_sync(kFull, take);
        const int at = listed + __popc(takers & ((1u << b.lane) - 1));
        if (take && at < kCandidates) list[at] = make_uint2(__float_as_uint(x[j]), uint32_t(index + j));
        listed += __popc(takers);
      }
    });
    count = listed;
    __syncwarp();
  }

  // Calls visit(score, index, whether it is a candidate) in order, with all lanes converged.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    if (count <= kCandidates) {
      const uint2* list = b.m.candidates + b.warp * kCandidates;
      for (int i = 0; i < count; i += 32) {
        const bool here = i + b.lane < count;
        const uint2 entry = list[here ? i + b.lane : 0];
        visit(__uint_as_float(entry.x), int(entry.y), here);
      }
    } else {
      const float low = b.m.heads[b.set].low;
      b.each_quad([&](float(&x)[4], int index, bool here) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (here && x[j] == -INFINITY && b.always_kept(b.token(index) + j)) x[j] = INFINITY;
          visit(x[j], index + j, here && x[j] >= low && x[j] > -INFINITY);
        }
      });
    }
  }
};

// -- exchange 2: the histogram, and the bin of each token set's k-th best --

__device__ __forceinline__ void find_edge(const FusedBlock& b, const Candidates& candidates) {
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, words = b.sets * kEdgeWords;
  if (b.set < b.sets) {
    const float low = m.heads[b.set].low, scale = m.heads[b.set].scale;
    uint32_t* counts = m.counts + b.set * kEdgeWords;
    candidates.each([&](float x, int, bool here) {
      if (!here || x == INFINITY) return;
      const int bin = edge_bin(x, low, scale);
      atomicAdd(counts + bin / 2, 1u << 16 * (bin % 2));
    });
  }
  __syncthreads();
  for (int r = warp; r < b.s.cluster; r += kFusedWarps) {
    const uint32_t to = remote(m.copies + b.rank * words, r);
    for (int i = lane; i < words / 4; i += 32) remote_store16(to + i * 16, reinterpret_cast<const uint4*>(m.counts)[i]);
  }
  cluster_sync();
  if (warp < b.sets && b.plan.need > 0) {  // a warp per set; a lane has four bins, summed over the blocks
    uint32_t count[4] = {0, 0, 0, 0};
    const uint32_t* from = m.copies + warp * kEdgeWords;
#pragma unroll 4
    for (int r = 0; r < b.s.cluster; ++r) {
      const uint2 x = *reinterpret_cast<const uint2*>(from + r * words + kEdgeWords - 2 - 2 * lane);
      count[0] += x.y >> 16, count[1] += x.y & 0xffff, count[2] += x.x >> 16, count[3] += x.x & 0xffff;
    }
    const uint32_t need = b.plan.need;
    const LaneBin own = find_lane_bin(count, need);
    const int owner = __ffs(__ballot_sync(kFull, own.sum >= need)) - 1;
    const int edge = __shfl_sync(kFull, int(own.bin.index), max(owner, 0));
    // Own members of the edge bin follow those of the blocks with lower rank.
    const uint32_t theirs = lane < b.rank ? from[lane * words + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
    const uint32_t base = __reduce_add_sync(kFull, theirs);
    if (lane == owner) {
      auto& head = m.heads[warp];
      head.edge = edge, head.size = own.bin.size, head.wanted = need - own.bin.before, head.base = base;
      if (own.bin.size > kMembers) m.search_failed() = 1;
    }
    if (owner < 0 && lane == 0) m.search_failed() = 1;
  }
  __syncthreads();
}

// -- exchange 3: the members of the edge bin, and the k-th best among them --

// A token is selected if its score is above head.score, or equal to it and the token is not older than head.token.
__device__ __forceinline__ void find_threshold(const FusedBlock& b, const Candidates& candidates) {
  const FusedMemory& m = b.m;
  if (b.plan.need == 0) {
    if (int(threadIdx.x) < b.sets) m.heads[threadIdx.x].score = FLT_MAX, m.heads[threadIdx.x].token = INT_MAX;
    __syncthreads();
    return;
  }
  if (b.set < b.sets) {
    auto& head = m.heads[b.set];
    const float low = head.low, scale = head.scale;
    const int edge = head.edge;
    candidates.each([&](float x, int index, bool here) {
      if (!here || x == INFINITY || edge_bin(x, low, scale) != edge) return;
      const uint32_t at = head.base + atomicAdd(&head.placed, 1u);
      for (int r = 0; r < b.s.cluster; ++r)
        remote_store8(remote(m.members + b.set * kMembers + at, r), make_uint2(__float_as_uint(x), b.token(index)));
    });
  }
  cluster_sync();
  if (b.set < b.sets) {
    auto& head = m.heads[b.set];
    const uint2* members = m.members + b.set * kMembers;
    for (int i = b.sub * 32 + b.lane; i < head.size; i += b.warps_per_set * 32) {
      const float score = __uint_as_float(members[i].x);
      const int token = members[i].y;
      int better = 0;
#pragma unroll 4
      for (int j = 0; j < head.size; ++j) {
        const uint2 other = members[j];
        better += __uint_as_float(other.x) > score || (__uint_as_float(other.x) == score && int(other.y) > token);
      }
      if (better == head.wanted - 1) head.score = score, head.token = token;
    }
  }
  __syncthreads();
}

// -- instead of exchange 3: radix passes over (score, token), for any scores --

// Seven bits per pass, with one cluster barrier each. Two histograms alternate: while blocks read one from each other,
// the other is cleared and filled. Not inlined, because it is rare and would raise the register count of the kernel.
inline __device__ __noinline__ void radix_search(const DecodeParams& p, const FusedShape& s, uint8_t* memory) {
  const FusedBlock b(p, s, memory);
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, sets = b.sets;
  const int bits = token_bits(b.plan.length);
  if (int(threadIdx.x) < sets) m.heads[threadIdx.x].prefix = 0, m.heads[threadIdx.x].need = b.plan.need;
  int parity = 0;
  for (int shift = 32 + bits; shift > 0; parity ^= 1) {
    const int above = shift;
    shift = max(shift - 7, 0);
    uint32_t* bins = m.wide + parity * sets * kEdgeBins;
    for (int i = threadIdx.x; i < sets * kEdgeBins; i += kFusedThreads) bins[i] = 0;
    __syncthreads();
    b.each_quad([&](float(&x)[4], int index, bool) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (x[j] == -INFINITY) continue;
        const uint64_t value = rank_key(order_key(x[j]), b.token(index + j), bits);
        const RadixDigit digit{m.heads[b.set].prefix, above, shift};
        if (digit.has(value)) atomicAdd(bins + b.set * kEdgeBins + digit(value), 1u);
      }
    });
    cluster_sync();
    if (warp < sets) {  // a warp per set; a lane has four bins, summed over the blocks
      uint32_t count[4] = {0, 0, 0, 0};
      for (int r = 0; r < s.cluster; ++r) {
        const uint4 x = remote_load16(remote(bins + warp * kEdgeBins + (31 - lane) * 4, r));
        count[0] += x.w, count[1] += x.z, count[2] += x.y, count[3] += x.x;
      }
      const uint32_t need = m.heads[warp].need;
      const LaneBin own = find_lane_bin(count, need);
      __syncwarp();  // every lane has read `need`
      if (own.owned(need)) {  // one lane
        m.heads[warp].need = need - own.bin.before;
        m.heads[warp].prefix = m.heads[warp].prefix << (above - shift) | own.bin.index;
      }
    }
    __syncthreads();
  }
  if (int(threadIdx.x) < sets) {
    auto& head = m.heads[threadIdx.x];
    head.score = from_order_key(uint32_t(head.prefix >> bits));
    head.token = int(head.prefix & ((1ull << bits) - 1));
  }
  cluster_sync();  // all blocks have read the histograms, whose memory the selected tokens reuse
}

}  // namespace adamas
