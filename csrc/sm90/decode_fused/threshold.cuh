// Stage 2 of the fused kernel: every block of the cluster finds the k-th best score and its token for each token set,
// in three exchanges through distributed shared memory.
//
//   1. mean and deviation of a sample of the scores, which the bins follow from   find_range
//   2. a histogram over the bins, and the bin of the k-th best                    find_edge
//   3. the members of that edge bin, ranked                                       find_threshold
//
// A block writes its part to every block, so that each of them computes the same result locally; a cluster barrier
// ends each exchange. If the edge bin is too full for exchange 3, as with equal scores, histograms within it narrow it
// down (narrow_edge). So the distribution of the scores decides only how many exchanges there are.
#pragma once
#include <cfloat>
#include <climits>

#include "sm90/decode_fused/block.cuh"
#include "sm90/histogram.cuh"
#include "sm90/normal.cuh"
#include "sm90/order.cuh"

namespace adamas {

// -- bins --

// A score's position in units of the deviation is t = (score - low) * scale, about kEdgePosition for the k-th best of
// normally distributed scores. Bins divide every octave of t from 2^kFirstOctave on equally, so that they are fine where
// the k-th best should be and reach far. The first bin holds all lower scores, the last one all higher ones.
constexpr int kFirstOctave = -2, kOctaveBits = 6;
constexpr float kEdgePosition = 1.5f;

// The bin of a score; it is monotonic in the score. Each operation is rounded separately, so that the compiler cannot
// contract them in one place and not in another.
__device__ __forceinline__ int edge_bin(float x, float low, float scale) {
  const int t = __float_as_int(fmaxf(__fmul_rn(__fsub_rn(x, low), scale), 0.0f));
  return min(max((t - ((127 + kFirstOctave) << 23) >> (23 - kOctaveBits)) + 1, 0), kEdgeBins - 1);
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
  atomicAdd(counts + bin / 2, uint32_t(__popc(same)) << 16 * (bin % 2));
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
// place of the block's own members after those of the blocks with lower rank. One lane writes them. If the counted bins
// do not reach the k-th best, it is among the scores that were not counted, in bin 0.
__device__ __forceinline__ void find_bin(const FusedBlock& b, FusedHead& head) {
  constexpr int kPerLane = kEdgeBins / 32;
  const int lane = b.lane, words = b.sets * kEdgeWords;
  uint32_t count[kPerLane] = {};  // a lane's bins in descending order, summed over the blocks
  const uint32_t* from = b.m.copies + b.warp * kEdgeWords;
#pragma unroll 4
  for (int r = 0; r < b.s.cluster; ++r) {
    const uint4 x = *reinterpret_cast<const uint4*>(from + r * words + kEdgeWords - kPerLane / 2 * (lane + 1));
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) {
      const uint32_t word = word_at(x, kPerLane / 2 - 1 - i);
      count[2 * i] += word >> 16, count[2 * i + 1] += word & 0xffff;
    }
  }
  const uint32_t wanted = head.wanted;
  const LaneBin own = find_lane_bin(count, wanted);
  const int owner = __ffs(__ballot_sync(kFull, own.sum >= wanted)) - 1;
  const int edge = __shfl_sync(kFull, int(own.bin.index), max(owner, 0));
  const uint32_t theirs = lane < b.rank ? from[lane * words + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
  const uint32_t base = __reduce_add_sync(kFull, theirs);
  __syncwarp();  // every lane has read `wanted`
  if (lane == owner) {
    head.edge = edge, head.size = own.bin.size, head.wanted = wanted - own.bin.before, head.base = base;
  } else if (owner < 0 && lane == 31) {
    head.edge = 0, head.size = INT_MAX, head.wanted = wanted - own.sum;
  }
  __syncwarp();
}
static_assert(kEdgeBins == 256);  // a lane's bins are 16 bytes

// -- exchange 1: the sample, and the bins --

__device__ __forceinline__ void find_range(const FusedBlock& b) {
  const FusedMemory& m = b.m;
  const int sets = b.sets;
  cluster_wait();  // for the arrival at the kernel's start: the other blocks run and accept stores
  if (b.lane < sets)
    for (int r = b.warp; r < b.s.cluster; r += kFusedWarps) {
      const ScoreSample& own = m.heads[b.lane].sample;
      remote_store16(remote(m.samples + b.rank * sets + b.lane, r),
                     make_uint4(__float_as_uint(own.sum), __float_as_uint(own.squares), own.count, 0));
    }
  cluster_sync();
  if (b.warp < sets) {  // one block per lane
    ScoreSample sample{0.0f, 0.0f, 0};
    if (b.lane < b.s.cluster) sample = m.samples[b.lane * sets + b.warp];
    const float sum = warp_sum(sample.sum), squares = warp_sum(sample.squares);
    const float inverse = __fdividef(1.0f, __reduce_add_sync(kFull, sample.count));
    if (b.lane == 0) {
      FusedHead& head = m.heads[b.warp];
      const float mean = sum * inverse, deviation = sqrtf(fmaxf(squares * inverse - mean * mean, 0.0f));
      const float scale = __fdividef(1.0f, deviation), share = __fdividef(b.plan.need, b.plan.middle);
      // Scores that are equal or that hardly differ have no useful bins.
      const bool binned = deviation > 1e-3f * fabsf(mean) && scale < 3e38f;
      head.low = mean + deviation * ((share < 0.5f ? normal_tail(share) : 0.0f) - kEdgePosition);
      head.scale = binned ? scale : 0.0f;
      head.size = INT_MAX, head.wanted = b.plan.need, head.edge = 0;
      head.exact = b.plan.need == 0;
      head.from = head.to = ~0ull;  // no rank
      if (binned) m.search_failed() = 0;
    }
  }
  __syncthreads();
}

// -- exchange 2: the histogram --

__device__ __forceinline__ void find_edge(const FusedBlock& b) {
  const FusedMemory& m = b.m;
  const FusedHead& own = m.heads[min(b.set, b.sets - 1)];
  const float low = own.low, scale = own.scale;
  uint32_t* counts = m.counts + b.set * kEdgeWords;
  b.each_quad([&](float(&x)[4], int, bool) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int bin = edge_bin(x[j], low, scale);
      count_bins(counts, bin > 0 && x[j] > -INFINITY, bin);
    }
  });
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
// (rank_key). First the range shrinks to the members' own; then histograms of kEdgeBins equal parts narrow it, so that
// equal scores are told apart by their tokens. Not inlined, because it would raise the register count of the kernel.
inline __device__ __noinline__ void narrow_edge(const DecodeParams& p, const FusedShape& s, uint8_t* memory) {
  const FusedBlock b(p, s, memory);
  const FusedMemory& m = b.m;
  const int lane = b.lane, warp = b.warp, sets = b.sets;
  const int bits = token_bits(b.plan.length);
  // Calls visit(rank, whether it is in the set's range), with all lanes converged.
  auto each_rank = [&](auto visit) {
    const FusedHead& head = m.heads[min(b.set, sets - 1)];
    const uint64_t from = head.from, to = head.to;
    const bool wide = head.size > kMembers;
    b.each_quad([&](float(&x)[4], int index, bool) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t rank = rank_key(order_key(x[j]), b.token(index + j), bits);
        visit(rank, wide && x[j] > -INFINITY && rank >= from && rank <= to);
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
      const uint32_t bottom = order_key(-FLT_MAX), top = order_key(FLT_MAX);
      const uint32_t first = first_key(bottom, top, head.edge, head.low, head.scale);
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
    each_rank([&](unsigned long long rank, bool here) {
      if (here) least = min(least, rank), most = max(most, rank);
    });
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
        remote_store16(remote(m.samples + b.rank * sets + lane, r),
                       make_uint4(uint32_t(head.least), uint32_t(head.least >> 32), uint32_t(head.most),
                                  uint32_t(head.most >> 32)));
      }
    cluster_sync();
    if (warp < sets) {
      least = ~0ull, most = 0;
      if (lane < s.cluster) {
        const uint4 x = *reinterpret_cast<const uint4*>(m.samples + lane * sets + warp);
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
    const FusedHead& own = m.heads[min(b.set, sets - 1)];
    const uint64_t from = own.from;
    const int own_shift = range_shift(own);
    each_rank([&](uint64_t rank, bool here) {
      count_bins(m.counts + b.set * kEdgeWords, here, here ? int((rank - from) >> own_shift) : 0);
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

// Tokens that a warp may have to select: those in the edge bin or above it, and those that are always kept, with score
// inf. The order of the list depends on the scores alone. If the list cannot hold them all, each() passes over all scores
// again.
struct Candidates {
  const FusedBlock& b;
  const int bits;
  float low, scale;
  int edge;
  bool exact;
  uint64_t from, to;
  int count;

  __device__ __forceinline__ explicit Candidates(const FusedBlock& b) : b(b), bits(token_bits(b.plan.length)) {
    const FusedHead& head = b.m.heads[min(b.set, b.sets - 1)];
    low = head.low, scale = head.scale, edge = head.edge, exact = head.exact, from = head.from, to = head.to;
    uint2* list = b.m.candidates + b.warp * kCandidates;
    int listed = 0;
    each_score([&](float x, int index, bool here) {
      const uint32_t takers = __ballot_sync(kFull, here);
      const int at = listed + __popc(takers & ((1u << b.lane) - 1));
      if (here && at < kCandidates) list[at] = make_uint2(__float_as_uint(x), uint32_t(index));
      listed += __popc(takers);
    });
    count = listed;
    __syncwarp();
  }

  // Whether a candidate that is not always kept is a member of the edge bin.
  __device__ __forceinline__ bool at_edge(float x, int token) const {
    return exact ? rank_key(order_key(x), token, bits) <= to : edge_bin(x, low, scale) == edge;
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
      each_score(visit);
    }
  }

 private:
  template <class Visit>
  __device__ __forceinline__ void each_score(Visit visit) const {
    const bool any_kept = b.p.num_sink_tokens + b.p.recent_window > 0;
    b.each_quad([&](float(&x)[4], int index, bool here) {
      const int first = any_kept || exact ? b.token(index) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool reaches =
            exact ? rank_key(order_key(x[j]), first + j, bits) >= from : edge_bin(x[j], low, scale) >= edge;
        bool take = here && x[j] > -INFINITY && reaches;
        if (any_kept && here && x[j] == -INFINITY && b.always_kept(first + j)) x[j] = INFINITY, take = true;
        visit(x[j], index + j, take);
      }
    });
  }
};

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
    candidates.each([&](float x, int index, bool here) {
      if (!here || x == INFINITY || !candidates.at_edge(x, b.token(index))) return;
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
