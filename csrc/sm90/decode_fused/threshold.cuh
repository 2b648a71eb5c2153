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

// The bins span the floor to the best score, or to a few times the distance from the floor to the largest floor of a warp,
// so that outliers do not stretch them; better scores share the last bin. If there are too few groups for a floor,
// or if all scores that may be selected are equal, there are no bins.
__device__ __forceinline__ void find_range(const FusedBlock& b) {
  constexpr float kReach = 4.0f;
  const FusedMemory& m = b.m;
  const int sets = b.sets;
  cluster_wait();  // for the arrival at the kernel's start: the other blocks run and accept stores
  if (b.lane < sets)
    for (int r = b.warp; r < b.s.cluster; r += kFusedWarps) {
      const FusedRange& own = m.heads[b.lane].range;
      remote_store16(remote(m.ranges + b.rank * sets + b.lane, r),
                     make_uint4(own.floor, own.best, own.groups, own.high_floor));
    }
  cluster_sync();
  if (b.warp < sets) {  // one block per lane
    FusedRange range{kFull, 0, 0, 0};
    if (b.lane < b.s.cluster) range = m.ranges[b.lane * sets + b.warp];
    const uint32_t floor = __reduce_min_sync(kFull, range.floor), top = __reduce_max_sync(kFull, range.best);
    const uint32_t groups = __reduce_add_sync(kFull, range.groups), high = __reduce_max_sync(kFull, range.high_floor);
    if (b.lane == 0) {
      auto& head = m.heads[b.warp];
      const bool bounded = groups >= uint32_t(b.plan.need);
      const float low = bounded && groups ? from_order_key(floor) : -FLT_MAX, best = from_order_key(top);
      const float reach = high > floor ? fminf(best - low, kReach * (from_order_key(high) - low)) : best - low;
      const float scale = __fdividef(kEdgeBins - 1, reach);
      head.low = low;
      head.exact = !(bounded && floor < top && scale > 0.0f && scale < 3e38f);
      head.scale = head.exact ? 0.0f : scale;
      head.size = INT_MAX, head.wanted = b.plan.need;
      const int bits = token_bits(b.plan.length);
      head.from = uint64_t(order_key(low)) << bits;
      head.to = uint64_t(top) << bits | (b.plan.length - 1);
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

__device__ __forceinline__ void count_bin(uint32_t* counts, int bin, uint32_t number = 1) {
  atomicAdd(counts + bin / 2, number << 16 * (bin % 2));
}

// Adds one to the bin of every lane that takes part; all lanes call it. Lanes that are many, and may have the same bin
// because neighbouring tokens score alike, are counted together.
__device__ __forceinline__ void count_bins(uint32_t* counts, bool takes, int bin) {
  constexpr int kFew = 8;
  const uint32_t takers = __ballot_sync(kFull, takes);
  if (!takes) return;
  uint32_t same = 1;
  if (__popc(takers) > kFew) {
    same = __match_any_sync(takers, bin);
    if (int(threadIdx.x % 32) != __ffs(same) - 1) return;
  }
  count_bin(counts, bin, __popc(same));
}

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
  const int edge = __shfl_sync(kFull, int(own.bin.index), owner);
  const uint32_t theirs = lane < b.rank ? from[lane * words + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
  const uint32_t base = __reduce_add_sync(kFull, theirs);
  __syncwarp();  // every lane has read `wanted`
  if (lane == owner) head.edge = edge, head.size = own.bin.size, head.wanted = wanted - own.bin.before, head.base = base;
  __syncwarp();
}

__device__ __forceinline__ void find_edge(const FusedBlock& b, const Candidates& candidates) {
  const FusedMemory& m = b.m;
  if (b.set < b.sets && !m.heads[b.set].exact) {
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
    if (!head.exact) find_bin(b, head);
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
// (rank_key). The range shrinks to the members' own scores, or to the best one if enough members have it. Then a
// histogram of equal parts narrows it, by their tokens if the scores are equal. Not inlined, because it would raise the
// register count of the kernel.
inline __device__ __noinline__ void narrow_edge(const DecodeParams& p, const FusedShape& s, uint8_t* memory) {
  const FusedBlock b(p, s, memory);
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, sets = b.sets;
  const int bits = token_bits(b.plan.length);
  const uint64_t last_token = b.plan.length - 1;
  FusedHead& own = m.heads[min(b.set, sets - 1)];   // the set whose scores this warp looks at
  FusedHead& found = m.heads[min(warp, sets - 1)];  // the set that it decides on
  const bool decides = warp < sets && found.size > kMembers;
  if (decides && !found.exact) {
    const uint32_t bottom = uint32_t(found.from >> bits), top = uint32_t(found.to >> bits);
    const uint32_t first = first_key(bottom, top, found.edge, found.low, found.scale);
    const uint32_t next =
        found.edge < kEdgeBins - 1 ? first_key(first, top, found.edge + 1, found.low, found.scale) : top + 1;
    __syncwarp();
    if (lane == 0) found.from = uint64_t(first) << bits, found.to = (uint64_t(next) << bits) - 1;
  }
  if (decides && lane == 0) {
    found.exact = true;
    if (b.rank == 0) count_search(p);
  }
  __syncthreads();
  for (;;) {
    bool shrink = false;
    for (int i = 0; i < sets; ++i)
      shrink |= m.heads[i].size > kMembers && m.heads[i].from >> bits != m.heads[i].to >> bits;
    const bool wide = own.size > kMembers;
    // Calls visit(rank, whether it is in the set's range), with all lanes converged.
    auto each_rank = [&](auto visit) {
      const uint64_t from = own.from, to = own.to;
      b.each_quad([&](float(&x)[4], int index, bool) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint64_t rank = rank_key(order_key(x[j]), b.token(index + j), bits);
          visit(rank, wide && x[j] > -INFINITY && rank >= from && rank <= to);
        }
      });
    };
    if (shrink) {  // all blocks agree
      uint32_t least = kFull, most = 0, count = 0;  // order keys, and members with the largest one
      each_rank([&](uint64_t rank, bool here) {
        const uint32_t key = uint32_t(rank >> bits);
        if (!here) return;
        count = key > most ? 1 : count + (key == most);
        least = min(least, key), most = max(most, key);
      });
      const uint32_t top = __reduce_max_sync(kFull, most);
      least = __reduce_min_sync(kFull, least);
      count = __reduce_add_sync(kFull, most == top ? count : 0);
      if (lane == 0) m.parts[warp] = make_uint4(least, top, count, 0);
      cluster_sync();  // every block has read the previous ranges
      if (lane < sets) {  // a set's warps are neighbours
        uint4 range = make_uint4(kFull, 0, 0, 0);
        for (int w = lane * b.warps_per_set; w < (lane + 1) * b.warps_per_set; ++w) {
          const uint4 x = m.parts[w];
          range = make_uint4(min(range.x, x.x), max(range.y, x.y),
                             x.y > range.y ? x.z : range.z + (x.y == range.y ? x.z : 0), 0);
        }
        for (int r = warp; r < s.cluster; r += kFusedWarps)
          remote_store16(remote(m.ranges + b.rank * sets + lane, r), range);
      }
      cluster_sync();
      if (decides && found.size > kMembers) {
        uint4 range = make_uint4(kFull, 0, 0, 0);
        if (lane < s.cluster) range = reinterpret_cast<const uint4*>(m.ranges)[lane * sets + warp];
        least = __reduce_min_sync(kFull, range.x), most = __reduce_max_sync(kFull, range.y);
        count = __reduce_add_sync(kFull, range.y == most ? range.z : 0);
        if (int(count) >= found.wanted) least = most;
        __syncwarp();
        if (lane == 0) {
          found.from = max(found.from, uint64_t(least) << bits);
          found.to = min(found.to, uint64_t(most) << bits | last_token);
        }
      }
      __syncthreads();
    }
    cluster_arrive();  // this block has read the previous histograms
    for (int i = threadIdx.x; i < sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
    __syncthreads();
    const uint64_t from = own.from;
    const int own_shift = range_shift(own);
    each_rank([&](uint64_t rank, bool here) {
      count_bins(m.counts + b.set * kEdgeWords, here, here ? int((rank - from) >> own_shift) : 0);
    });
    __syncthreads();
    cluster_wait();
    send_counts(b);
    cluster_sync();
    if (decides && found.size > kMembers) {
      const int shift = range_shift(found);
      find_bin(b, found);
      if (lane == 0) {
        found.from += uint64_t(found.edge) << shift;
        found.to = min(found.to, found.from + (uint64_t(1) << shift) - 1);
      }
      __syncwarp();
    }
    if (!__syncthreads_or(decides && found.size > kMembers)) break;
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
  const int bits = token_bits(b.plan.length);
  if (b.set < b.sets) {
    auto& head = m.heads[b.set];
    const float low = head.low, scale = head.scale;
    const int edge = head.edge;
    const bool exact = head.exact;
    const uint64_t from = head.from, to = head.to;
    candidates.each([&](float x, int index, bool here) {
      if (!here || x == INFINITY) return;
      const uint64_t rank = rank_key(order_key(x), b.token(index), bits);
      if (exact ? rank < from || rank > to : edge_bin(x, low, scale) != edge) return;
      const uint32_t at = head.base + atomicAdd(&head.placed, 1u);
      for (int r = 0; r < b.s.cluster; ++r)
        remote_store8(remote(m.members + b.set * kMembers + at, r), make_uint2(uint32_t(rank), uint32_t(rank >> 32)));
    });
  }
  cluster_sync();
  if (b.set < b.sets) {
    auto& head = m.heads[b.set];
    const uint64_t* members = m.members + b.set * kMembers;
    const int size = head.size, last = head.wanted - 1;
    for (int i = b.sub * 32 + b.lane; i < size; i += b.warps_per_set * 32) {
      const uint64_t rank = members[i];
      int better = 0;
#pragma unroll 4
      for (int j = 0; j < size; ++j) better += members[j] > rank;
      if (better != last) continue;
      head.score = from_order_key(uint32_t(rank >> bits));
      head.token = int(rank & ((1ull << bits) - 1));
    }
  }
  __syncthreads();
}

}  // namespace adamas
