// Stage 2 of the fused kernel: every block of the cluster finds the k-th best score and its token for each token set,
// in three exchanges through distributed shared memory.
//
//   1. the range of the scores                         find_range
//   2. a histogram over it, the bin of the k-th best   find_edge
//   3. the members of that edge bin, ranked            find_threshold
//
// A block writes its part to every block, so that each of them computes the same result locally; a cluster barrier
// ends each exchange. Tokens below the floor of the range cannot be selected, so warps list the others once
// (Candidates) and process nothing else. If the edge bin is too full for exchange 3, as with equal scores, further
// histograms within it narrow it down (narrow_edge).
#pragma once
#include <cfloat>
#include <climits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/histogram.cuh"
#include "sm90/order.cuh"

namespace adamas {

// -- exchange 1: the range --

// The bins span the floor to the mean of the groups' maxima and as much again. The k-th best is near that mean if
// there are about as many groups as tokens needed, whatever the distribution; a few outliers hardly move the mean,
// and better scores share the last bin.
__device__ __forceinline__ void find_range(const FusedBlock& b) {
  const FusedMemory& m = b.m;
  const int sets = b.sets;
  cluster_wait();  // for the arrival at the kernel's start: the other blocks run and accept stores
  if (b.lane < sets)
    for (int r = b.warp; r < b.s.cluster; r += kFusedWarps) {
      const auto& head = m.heads[b.lane];
      const uint32_t to = remote(m.ranges + b.rank * sets + b.lane, r);
      remote_store16(to, make_uint4(head.floor, head.best, head.worst, head.groups));
      remote_store(to + sizeof(uint4), head.sum);
    }
  cluster_sync();
  if (b.warp < sets) {  // one block per lane
    FusedRange range{kFull, 0, kFull, 0, 0.0f};
    if (b.lane < b.s.cluster) range = m.ranges[b.lane * sets + b.warp];
    const uint32_t floor = __reduce_min_sync(kFull, range.floor), top = __reduce_max_sync(kFull, range.best);
    const uint32_t bottom = __reduce_min_sync(kFull, range.worst), groups = __reduce_add_sync(kFull, range.groups);
    const float sum = warp_sum(range.sum);
    if (b.lane == 0) {
      auto& head = m.heads[b.warp];
      const uint32_t least = groups >= uint32_t(b.plan.need) ? floor : bottom;
      const float low = groups ? from_order_key(least) : 0.0f, best = groups ? from_order_key(top) : 0.0f;
      const float high = fminf(best, low + 2.0f * (__fdividef(sum, groups) - low));
      const float scale = high > low ? __fdividef(kEdgeBins - 1, high - low) : 0.0f;
      head.low = low;
      head.scale = scale < 3e38f ? scale : 0.0f;
      head.best = top;
      // All scores that may be selected are equal: only tokens differ.
      head.exact = least == top;
      head.size = INT_MAX, head.wanted = b.plan.need;
      head.from = uint64_t(top) << token_bits(b.plan.length);
      head.to = head.from + b.plan.length - 1;
      if (!head.exact) m.search_failed() = 0;
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

__device__ __forceinline__ void count_bin(uint32_t* counts, int bin) { atomicAdd(counts + bin / 2, 1u << 16 * (bin % 2)); }

// Sends the block's histograms to all blocks. The caller waits until they have arrived.
__device__ __forceinline__ void send_counts(const FusedBlock& b) {
  const int words = b.sets * kEdgeWords;
  for (int r = b.warp; r < b.s.cluster; r += kFusedWarps) {
    const uint32_t to = remote(b.m.copies + b.rank * words, r);
    for (int i = b.lane; i < words / 4; i += 32)
      remote_store16(to + i * 16, reinterpret_cast<const uint4*>(b.m.counts)[i]);
  }
}

// The edge bin of the warp's set, from the histograms of all blocks: its index, members, members to select, and the
// place of the block's own members after those of the blocks with lower rank. One lane writes them.
__device__ __forceinline__ void find_bin(const FusedBlock& b, FusedHead& head) {
  const int lane = b.lane, words = b.sets * kEdgeWords;
  uint32_t count[4] = {0, 0, 0, 0};  // a lane has four bins, summed over the blocks
  const uint32_t* from = b.m.copies + b.warp * kEdgeWords;
#pragma unroll 4
  for (int r = 0; r < b.s.cluster; ++r) {
    const uint2 x = *reinterpret_cast<const uint2*>(from + r * words + kEdgeWords - 2 - 2 * lane);
    count[0] += x.y >> 16, count[1] += x.y & 0xffff, count[2] += x.x >> 16, count[3] += x.x & 0xffff;
  }
  const uint32_t wanted = head.wanted;
  const LaneBin own = find_lane_bin(count, wanted);
  const int owner = __ffs(__ballot_sync(kFull, own.sum >= wanted)) - 1;
  const int edge = __shfl_sync(kFull, int(own.bin.index), max(owner, 0));
  const uint32_t theirs = lane < b.rank ? from[lane * words + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
  const uint32_t base = __reduce_add_sync(kFull, theirs);
  __syncwarp();  // every lane has read `wanted`
  if (lane == owner) head.edge = edge, head.size = own.bin.size, head.wanted = wanted - own.bin.before, head.base = base;
  __syncwarp();
}

__device__ __forceinline__ void find_edge(const FusedBlock& b, const Candidates& candidates) {
  const FusedMemory& m = b.m;
  if (b.set < b.sets) {
    const float low = m.heads[b.set].low, scale = m.heads[b.set].scale;
    uint32_t* counts = m.counts + b.set * kEdgeWords;
    candidates.each([&](float x, int, bool here) {
      if (here && x != INFINITY) count_bin(counts, edge_bin(x, low, scale));
    });
  }
  __syncthreads();
  send_counts(b);
  cluster_sync();
  if (b.warp < b.sets) {
    FusedHead& head = m.heads[b.warp];
    find_bin(b, head);
    if (b.lane == 0 && head.size > kMembers) m.search_failed() = 1;
  }
  __syncthreads();
}

// The smallest order key in [first, last] whose score is in bin `edge` or a higher one; last + 1 if there is none.
__device__ __forceinline__ uint32_t first_key(uint32_t first, uint32_t last, int edge, float low, float scale) {
  for (;;) {
    const uint32_t step = (last - first) / 32 + 1;
    const uint64_t key = uint64_t(first) + uint64_t(threadIdx.x % 32 + 1) * step - 1;
    const bool reached = key > last || edge_bin(from_order_key(uint32_t(key)), low, scale) >= edge;
    const int lane = __ffs(__ballot_sync(kFull, reached)) - 1;
    if (lane < 0) return last + 1;
    const uint64_t found = uint64_t(first) + uint64_t(lane) * step;
    if (found > last) return last + 1;
    first = uint32_t(found);
    if (step == 1) return first;
    last = uint32_t(min(uint64_t(last), found + step - 1));
  }
}

// Narrows edge bins that have too many members. A bin is now a range of ranks: (score, token) as one integer
// (rank_key). First the range shrinks to the members' own; then histograms of 128 equal parts narrow it, so that equal
// scores are told apart by their tokens. Not inlined, because it would raise the register count of the kernel.
inline __device__ __noinline__ void narrow_edge(const DecodeParams& p, const FusedShape& s, uint8_t* memory) {
  const FusedBlock b(p, s, memory);
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, sets = b.sets;
  const int bits = token_bits(b.plan.length);
  auto each_rank = [&](auto visit) {
    const FusedHead& head = m.heads[min(b.set, sets - 1)];
    const uint64_t from = head.from, to = head.to;
    if (head.size <= kMembers) return;
    b.each_quad([&](float(&x)[4], int index, bool) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t rank = rank_key(order_key(x[j]), b.token(index + j), bits);
        if (x[j] > -INFINITY && rank >= from && rank <= to) visit(rank);
      }
    });
  };
  bool shrink = false;
  for (int i = 0; i < sets; ++i) shrink |= m.heads[i].size > kMembers && !m.heads[i].exact;
  __syncthreads();
  if (warp < sets) {
    FusedHead& head = m.heads[warp];
    const bool own = head.size > kMembers && !head.exact;
    if (own) {
      const uint32_t floor = order_key(head.low), top = head.best;
      const uint32_t first = first_key(floor, top, head.edge, head.low, head.scale);
      const uint32_t next =
          head.edge < kEdgeBins - 1 ? first_key(first, top, head.edge + 1, head.low, head.scale) : top + 1;
      __syncwarp();
      if (lane == 0) head.from = uint64_t(first) << bits, head.to = (uint64_t(next) << bits) - 1;
    }
    __syncwarp();
    if (lane == 0) {
      head.least = ~0ull, head.most = 0;
      if (head.size > kMembers) {
        head.exact = true;
        if (b.rank == 0) count_search(p);
      }
    }
  }
  __syncthreads();
  if (shrink) {  // all blocks agree
    unsigned long long least = ~0ull, most = 0;
    each_rank([&](unsigned long long rank) { least = min(least, rank), most = max(most, rank); });
#pragma unroll
    for (int step = 16; step; step /= 2) {
      least = min(least, __shfl_xor_sync(kFull, least, step));
      most = max(most, __shfl_xor_sync(kFull, most, step));
    }
    if (lane == 0 && b.set < sets) atomicMin(&m.heads[b.set].least, least), atomicMax(&m.heads[b.set].most, most);
    __syncthreads();
    if (lane < sets)
      for (int r = warp; r < s.cluster; r += kFusedWarps) {
        const auto& head = m.heads[lane];
        remote_store16(remote(m.ranges + b.rank * sets + lane, r),
                       make_uint4(uint32_t(head.least), uint32_t(head.least >> 32), uint32_t(head.most),
                                  uint32_t(head.most >> 32)));
      }
    cluster_sync();
    if (warp < sets) {
      least = ~0ull, most = 0;
      if (lane < s.cluster) {
        const uint4 x = *reinterpret_cast<const uint4*>(m.ranges + lane * sets + warp);
        least = (unsigned long long)x.y << 32 | x.x, most = (unsigned long long)x.w << 32 | x.z;
      }
#pragma unroll
      for (int step = 16; step; step /= 2) {
        least = min(least, __shfl_xor_sync(kFull, least, step));
        most = max(most, __shfl_xor_sync(kFull, most, step));
      }
      if (lane == 0 && m.heads[warp].size > kMembers) m.heads[warp].from = least, m.heads[warp].to = most;
    }
  }
  for (;;) {
    cluster_arrive();  // this block has read the previous histograms
    for (int i = threadIdx.x; i < sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
    __syncthreads();
    each_rank([&](uint64_t rank) {
      const FusedHead& head = m.heads[b.set];
      count_bin(m.counts + b.set * kEdgeWords, int((rank - head.from) >> range_shift(head)));
    });
    __syncthreads();
    cluster_wait();
    send_counts(b);
    cluster_sync();
    bool wide = false;
    if (warp < sets && m.heads[warp].size > kMembers) {
      FusedHead& head = m.heads[warp];
      const int shift = range_shift(head);
      find_bin(b, head);
      if (lane == 0) {
        head.from += uint64_t(head.edge) << shift;
        head.to = min(head.to, head.from + (uint64_t(1) << shift) - 1);
      }
      wide = head.size > kMembers;
    }
    if (!__syncthreads_or(wide)) break;
  }
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
    const int edge = head.edge, bits = token_bits(b.plan.length);
    const bool exact = head.exact;
    const uint64_t from = head.from, to = head.to;
    candidates.each([&](float x, int index, bool here) {
      if (!here || x == INFINITY) return;
      if (exact) {
        const uint64_t rank = rank_key(order_key(x), b.token(index), bits);
        if (rank < from || rank > to) return;
      } else if (edge_bin(x, low, scale) != edge) {
        return;
      }
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

}  // namespace adamas
