// Stage 2 of the fused kernel: every block of the cluster finds the k-th best score and its token, in three exchanges
// through distributed shared memory.
//
//   1. the range of the scores                         find_range (range.cuh)
//   2. a histogram over it, the bin of the k-th best   find_edge
//   3. the members of that edge bin, ranked            find_threshold
//
// A block writes its part to every block, so that each of them computes the same result locally; a cluster barrier
// ends each exchange. Where the range is a guess, the first exchange is left out, and the second tells whether enough tokens
// reach its low end. Listed tokens below the low end are not selected and leave the list. If the edge bin is too full for exchange 3, as with equal scores, further histograms within it narrow it down (narrow_edge).
#pragma once
#include "sm90/decode_fused/range.cuh"

namespace adamas {

// The listed tokens of a warp that may be selected, `count` of them. Calls visit(score, index, whether there is a token)
// in order, with all lanes converged.
struct Listed {
  const float* scores;
  const uint16_t* indices;
  int count;

  __device__ Listed(const FusedBlock& b, int count)
      : scores(b.m.scores + b.warp * kList), indices(b.m.indices + b.warp * kList), count(count) {}

  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
    for (int first = 0; first < count; first += 32) {
      const int i = first + threadIdx.x % 32;
      const bool here = i < count;
      visit(here ? scores[i] : -INFINITY, here ? int(indices[i]) : 0, here);
    }
  }
};

// Drops the tokens below the low end.
__device__ __forceinline__ Listed keep_listed(const FusedBlock& b, const ListState& list) {
  const int own = b.warp * kList;
  return Listed(b, keep_from(b.m.search.low, b.m.scores + own, b.m.indices + own, list));
}

// A score's bin; it is monotonic in the score. Above the fine bins lie wider ones for outliers, and what is better still
// shares the last bin. Each operation is rounded separately, so that the compiler cannot contract them in one place and
// not in another.
__device__ __forceinline__ int edge_bin(float x, float low, float scale) {
  constexpr float kOffset = kFineBins - float(kFineBins) / kCoarse;
  const float at = __fmul_rn(__fsub_rn(x, low), scale);
  return min(int(fminf(at, __fadd_rn(__fmul_rn(at, 1.0f / kCoarse), kOffset))), kEdgeBins - 1);
}

// -- exchange 2: the histogram, and the bin of the k-th best --

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

// Sends the block's histogram to all blocks. The caller waits until it has arrived.
__device__ __forceinline__ void send_counts(const FusedBlock& b) {
#pragma unroll 1
  for (int r = b.warp; r < b.s.cluster; r += b.s.num_warps)
    if (b.lane < kEdgeWords / 4)
      remote_store16(remote(b.m.copies + b.rank * kEdgeWords, r) + b.lane * 16,
                     reinterpret_cast<const uint4*>(b.m.counts)[b.lane]);
}

// The edge bin, from the histograms of all blocks: its index, members, members to select, and the place of the block's
// own members after those of the blocks with lower rank. One warp calls it, and one lane writes them; if fewer tokens than
// are wanted were counted, there is none.
__device__ __forceinline__ void find_bin(const FusedBlock& b, FusedSearch& search) {
  const int lane = b.lane;
  uint32_t count[4] = {0, 0, 0, 0};  // a lane has four bins, summed over the blocks
  const uint32_t* from = b.m.copies;
#pragma unroll 4
  for (int r = 0; r < b.s.cluster; ++r) {
    const uint2 x = *reinterpret_cast<const uint2*>(from + r * kEdgeWords + kEdgeWords - 2 - 2 * lane);
    count[0] += x.y >> 16, count[1] += x.y & 0xffff, count[2] += x.x >> 16, count[3] += x.x & 0xffff;
  }
  const uint32_t wanted = search.wanted;
  const LaneBin own = find_lane_bin(count, wanted);
  const uint32_t reached = __ballot_sync(kFull, own.sum >= wanted);
  if (lane == 0) search.enough = reached != 0;
  if (!reached) return;
  const int owner = __ffs(reached) - 1;
  const int edge = __shfl_sync(kFull, int(own.bin.index), owner);
  const uint32_t theirs = lane < b.rank ? from[lane * kEdgeWords + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
  const uint32_t base = __reduce_add_sync(kFull, theirs);
  __syncwarp();  // every lane has read `wanted`
  if (lane == owner)
    search.edge = edge, search.size = own.bin.size, search.wanted = wanted - own.bin.before, search.base = base;
  __syncwarp();
}

// Long lists, of keys whose scores come in clusters, then drop the tokens below that bin.
__device__ __forceinline__ void find_edge(const FusedBlock& b, Listed& listed) {
  constexpr int kLong = 128;
  const FusedMemory& m = b.m;
  const float low = m.search.low, scale = m.search.scale;
  listed.each([&](float x, int, bool here) {
    if (here) count_bin(m.counts, edge_bin(x, low, scale));
  });
  __syncthreads();
  send_counts(b);
  cluster_sync();
  if (b.warp == 0) {
    find_bin(b, m.search);
    if (b.lane == 0) m.search.failed = m.search.size > kMembers;
  }
  __syncthreads();
  if (listed.count > kLong) {
    const int own = b.warp * kList, edge = m.search.edge;
    listed.count = keep_if([=](float x) { return edge_bin(x, low, scale) >= edge; }, m.scores + own, m.indices + own,
                           ListState{listed.count, low, true});
  }
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

// Narrows an edge bin that has too many members. The bin is now a range of ranks: (score, token) as one integer
// (rank_key). The range shrinks to the members' own scores, or to the best one if enough members have it. Then a
// histogram of equal parts narrows it, by their tokens if the scores are equal. Not inlined, because it would raise the
// register count of the kernel.
inline __device__ __noinline__ void narrow_edge(const DecodeParams& p, const FusedShape& s, uint8_t* memory, int count) {
  const FusedBlock b(p, s, memory);
  const FusedMemory& m = b.m;
  const Listed listed(b, count);
  const int lane = b.lane, warp = b.warp;
  const int bits = token_bits(b.plan.length);
  FusedSearch& search = m.search;
  if (warp == 0 && !search.exact) {
    const uint32_t bottom = uint32_t(search.from >> bits), top = uint32_t(search.to >> bits);
    const uint32_t first = first_key(bottom, top, search.edge, search.low, search.scale);
    const uint32_t next =
        search.edge < kEdgeBins - 1 ? first_key(first, top, search.edge + 1, search.low, search.scale) : top + 1;
    __syncwarp();
    if (lane == 0) search.from = uint64_t(first) << bits, search.to = (uint64_t(next) << bits) - 1;
  }
  __syncwarp();  // the first warp has read `exact`
  if (threadIdx.x == 0) {
    search.exact = true;
    if (b.rank == 0) count_search(p);
  }
  __syncthreads();
  do {
    // Calls visit(rank, whether it is in the range), with all lanes converged.
    auto each_rank = [&](auto visit) {
      const uint64_t from = search.from, to = search.to;
      listed.each([&](float x, int index, bool here) {
        const uint64_t rank = rank_key(order_key(x), b.token(index), bits);
        visit(rank, here && rank >= from && rank <= to);
      });
    };
    if (search.from >> bits != search.to >> bits) {  // all blocks agree
      uint32_t least = kFull, most = 0, number = 0;  // order keys, and members with the largest one
      each_rank([&](uint64_t rank, bool here) {
        const uint32_t key = uint32_t(rank >> bits);
        if (!here) return;
        number = key > most ? 1 : number + (key == most);
        least = min(least, key), most = max(most, key);
      });
      // The range of several parts, one per lane, in every lane.
      auto merge = [](uint4 part) {
        const uint32_t top = __reduce_max_sync(kFull, part.y);
        return make_uint4(__reduce_min_sync(kFull, part.x), top, __reduce_add_sync(kFull, part.y == top ? part.z : 0), 0);
      };
      const uint4 nothing = make_uint4(kFull, 0, 0, 0);
      const uint4 own = merge(make_uint4(least, most, number, 0));
      if (lane == 0) m.parts[warp] = own;
      cluster_sync();  // every block has read the previous ranges
      if (warp == 0) {
        const uint4 range = merge(lane < s.num_warps ? m.parts[lane] : nothing);
        if (lane < s.cluster) remote_store16(remote(m.parts + s.num_warps + b.rank, lane), range);
      }
      cluster_sync();
      if (warp == 0) {
        const uint4 range = merge(lane < s.cluster ? m.parts[s.num_warps + lane] : nothing);
        if (lane == 0) {
          const uint32_t bottom = int(range.z) >= search.wanted ? range.y : range.x;
          search.from = max(search.from, uint64_t(bottom) << bits);
          search.to = min(search.to, uint64_t(range.y) << bits | (b.plan.length - 1));
        }
      }
      __syncthreads();
    }
    cluster_arrive();  // this block has read the previous histograms
    if (threadIdx.x < kEdgeWords) m.counts[threadIdx.x] = 0;
    __syncthreads();
    const uint64_t from = search.from;
    const int shift = range_shift(search);
    each_rank([&](uint64_t rank, bool here) { count_bins(m.counts, here, here ? int((rank - from) >> shift) : 0); });
    __syncthreads();
    cluster_wait();
    send_counts(b);
    cluster_sync();
    if (warp == 0) {
      find_bin(b, search);
      if (lane == 0) {
        search.from += uint64_t(search.edge) << shift;
        search.to = min(search.to, search.from + (uint64_t(1) << shift) - 1);
      }
    }
    __syncthreads();
  } while (search.size > kMembers);
}

// -- exchange 3: the members of the edge bin, and the k-th best among them --

// A token is selected if its score is above search.score, or equal to it and the token is not older than search.token.
__device__ __forceinline__ void find_threshold(const FusedBlock& b, const Listed& listed) {
  const FusedMemory& m = b.m;
  FusedSearch& search = m.search;
  const int bits = token_bits(b.plan.length);
  const float low = search.low, scale = search.scale;
  const int edge = search.edge;
  const bool exact = search.exact;
  const uint64_t from = search.from, to = search.to;
  listed.each([&](float x, int index, bool here) {
    if (!here) return;
    if (!exact && edge_bin(x, low, scale) != edge) return;
    const uint64_t rank = rank_key(order_key(x), b.token(index), bits);
    if (exact && (rank < from || rank > to)) return;
    const uint32_t at = search.base + atomicAdd(&search.placed, 1u);
#pragma unroll 1
    for (int r = 0; r < b.s.cluster; ++r)
      remote_store8(remote(m.members + at, r), make_uint2(uint32_t(rank), uint32_t(rank >> 32)));
  });
  cluster_sync();
  const int size = search.size, last = search.wanted - 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const uint64_t rank = m.members[i];
    int better = 0;
#pragma unroll 4
    for (int j = 0; j < size; ++j) better += m.members[j] > rank;
    if (better != last) continue;
    search.score = from_order_key(uint32_t(rank >> bits));
    search.token = int(rank & ((1ull << bits) - 1));
  }
  __syncthreads();
}

}  // namespace adamas
