// fused: a whole decode step of one (row, KV head) in one cluster of blocks, for small batches, where
// three launches and their chains of dependent loads cost more than the bytes.
//
// Stages (pipeline.cuh) are dealt round robin over the blocks of a cluster. A block keeps the scores of
// its tokens in shared memory. Three exchanges through distributed shared memory give every block the
// same threshold: the range of the scores, a histogram over it, and the scores in the bin of the k-th
// best. Each block then attends to those of its own tokens that reach the threshold; the parts meet in
// the block that writes the output.
#pragma once
#include <cfloat>

#include "sm90/softmax.cuh"
#include "sm90/cluster.cuh"
#include "sm90/query.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/select.cuh"

namespace adamas {

constexpr int kFusedThreads = 256, kFusedWarps = kFusedThreads / 32;
constexpr int kFusedGroup = kFusedWarps;  // query heads per KV head, at most: a warp for each of them
constexpr int kFusedStages = 3;           // of a warp's ring
constexpr int kEdgeBins = 128, kEdgeWords = kEdgeBins / 2;  // two 16-bit counts per word
constexpr int kMembers = 128;                               // of the edge bin of one head
constexpr int kCandidates = 512;                            // that a warp lists
constexpr int kTokens = 2048;                               // selected ones, over the sets

// -- shared memory --

// What a block knows about one token set.
struct FusedHead {
  uint32_t floor, best, worst, groups;  // own range, as order keys
  float low, scale;                     // bins
  int size, wanted, edge;               // the edge bin: members, how many of them are selected
  uint32_t base, placed;                // where own members go
  float score;                          // the k-th best: score and token
  int token;
  int active;  // warps that attended
  uint32_t need;
  uint64_t prefix;
};

struct FusedShape {
  int cluster;  // blocks
  int warps_per_set, set_magic;  // warp * set_magic / 256 is the set of a warp
  int score_stride, stage_bytes;
  uint32_t round_magic;  // ceil(2^32 / token quads of one stage per block)
  StageShape stage;
  // Offsets in shared memory. Where the ring was, selected tokens, candidates and the states of the
  // warps follow, or the histograms of a slow search; query scratch lies where scores will be.
  int states, scores, counts, copies, ranges, members, planes, bias, partial, softmax, barriers, heads, warps, bytes;
};

struct FusedMemory {
  uint8_t* ring;
  int* tokens;        // [head][kTokens / heads] selected
  uint2* candidates;  // [warp][kCandidates] score, index
  uint32_t* wide;     // [2][head][kEdgeBins]
  float* states;
  float* scores;      // [head][score_stride]
  uint32_t* counts;   // [head][kEdgeWords] own histogram
  uint32_t* copies;   // [block][head][kEdgeWords]
  uint4* ranges;      // [block][head] floor, best, worst, groups
  uint2* members;     // [head][kMembers] score, token
  uint32_t* planes;   // encoded queries
  int32_t* bias;      // [kMaxHeadQuads][4]
  float* partial;     // [block][own outputs]
  float2* softmax;    // [block][query head] top, sum
  uint64_t* barriers;
  FusedHead* heads;
  int* warps;  // selected tokens of each warp, then a failure flag

  __device__ FusedMemory(const FusedShape& s, uint8_t* m)
      : ring(m), tokens(reinterpret_cast<int*>(m)), candidates(reinterpret_cast<uint2*>(m + kTokens * 4)),
        wide(reinterpret_cast<uint32_t*>(m)), states(reinterpret_cast<float*>(m + s.states)),
        scores(reinterpret_cast<float*>(m + s.scores)),
        counts(reinterpret_cast<uint32_t*>(m + s.counts)), copies(reinterpret_cast<uint32_t*>(m + s.copies)),
        ranges(reinterpret_cast<uint4*>(m + s.ranges)), members(reinterpret_cast<uint2*>(m + s.members)),
        planes(reinterpret_cast<uint32_t*>(m + s.planes)), bias(reinterpret_cast<int32_t*>(m + s.bias)),
        partial(reinterpret_cast<float*>(m + s.partial)), softmax(reinterpret_cast<float2*>(m + s.softmax)),
        barriers(reinterpret_cast<uint64_t*>(m + s.barriers)), heads(reinterpret_cast<FusedHead*>(m + s.heads)),
        warps(reinterpret_cast<int*>(m + s.warps)) {}
};

// A score's bin; equal scores share one, better scores have the same or a higher one.
__device__ __forceinline__ int edge_bin(float x, float low, float scale) {
  return min(int(__fmul_rn(__fsub_rn(x, low), scale)), kEdgeBins - 1);
}

template <int D, class T, bool kFp8, Mode kMode, int kQuads>
struct Fused {
  static constexpr int kChunks = D <= 128 ? 1 : 2;
  static_assert(StageReader<kChunks, kMode>::kSteps == 2);
  using Softmax = Attention<D, T, 1, kFp8>;
  static constexpr int kRowBytes = Softmax::kRowBytes;
  using Reader = StageReader<kChunks, kMode>;

  const DecodeParams& p;
  const FusedShape& s;
  const FusedMemory m;
  const int lane, warp, rank, row, kv_head, sets;
  const int warps_per_set, set, sub;  // of the warps, in what follows the scores
  const RowPlan plan;
  int stages;  // of this block
  int candidates = 0;  // of this warp
  int part;    // scores that a warp of a set looks at

  __device__ Fused(const DecodeParams& p, const FusedShape& s, uint8_t* memory)
      : p(p), s(s), m(s, memory), lane(threadIdx.x % 32), warp(threadIdx.x / 32), rank(cluster_rank()),
        row(blockIdx.z), kv_head(blockIdx.y), sets(p.score_heads_per_kv), warps_per_set(s.warps_per_set),
        set(warp * s.set_magic >> 8), sub(warp - set * warps_per_set), plan(p, row) {
    const uint32_t round = s.stage.tokens / kQuad * s.cluster;  // quads
    const int quads = (plan.length - rank * s.stage.tokens + kQuad - 1) / kQuad;
    stages = quads > 0 ? int(__umulhi(quads + round - 1, s.round_magic)) : 0;
    part = (stages + warps_per_set - 1) / warps_per_set * kStageTokens;
  }

  __device__ T* output_of(int head) const {
    return static_cast<T*>(p.output.data) + row * p.output.token_stride +
           (kv_head * p.group + head) * p.output.head_stride;
  }

  __device__ void run() {
    cluster_arrive();  // a block may be written to once it runs
    if (plan.length <= 0) {
      begin();
      for (int i = threadIdx.x; rank == 0 && i < p.group * D; i += kFusedThreads) output_of(i / D)[i % D] = T(0.0f);
      cluster_wait();
      return;
    }
    Softmax softmax;
    if (plan.sparse) {
      score();
      find_range();
      find_edge();
      if (plan.need > 0 && m.warps[kFusedWarps]) search_slowly(p, s, m.ring);  // in every block
      else find_threshold();
      attend_selected(softmax);
    } else {
      begin();
      cluster_wait();
      attend_all(softmax);
    }
    merge(softmax);
  }

  // Up to here the kernel in front may still run: it writes none of the step's lengths, budgets and block
  // tables. What follows this one fetches pages as soon as it may start.
  __device__ void begin() const {
    touch(p);
    touch(s);
    wait_for_previous();
    let_next_start();
    if (threadIdx.x == 0 && rank == 0 && kv_head == 0) count_row(p, plan);
  }

  __device__ __forceinline__ int first_token(int own_stage) const {
    return (own_stage * s.cluster + rank) * s.stage.tokens;
  }
  // Own tokens have an index, kStageTokens of them per own stage.
  __device__ __forceinline__ int token_of(int index) const {
    return first_token(index / kStageTokens) + index % kStageTokens;
  }

  // -- the scores of the own tokens, and their range --

  __device__ void score() {
    const StageShape& shape = s.stage;
    StageRing<kFusedStages> ring(m.ring + warp * kFusedStages * s.stage_bytes, m.barriers + warp * kFusedStages,
                                 s.stage_bytes);
    const int32_t* blocks = p.block_table + row * p.blocks_per_row;
    const uint8_t* run = p.page.base + kv_head * p.page.head_stride;
    auto block_of = [&](int stage, int end) -> uint32_t {  // of this lane's part of the stage at a token
      const int token = stage + lane * shape.part_tokens;
      return lane < shape.parts && token < end ? __ldg(blocks + block_of_quad(p.page, token / kQuad)) : 0;
    };
    const int stride = kFusedWarps * s.cluster * shape.tokens;  // from one stage of a warp to its next
    // The row's length is still on the way.
    uint32_t block[kFusedStages];
#pragma unroll
    for (int i = 0; i < kFusedStages; ++i) block[i] = block_of(first_token(warp) + i * stride, p.max_seq_len);
    QueryMemory queries{m.planes, m.bias, m.scores};
    clear_queries<kChunks, kMode>(p, queries);
    for (int i = threadIdx.x; i < sets * kEdgeWords; i += kFusedThreads) m.counts[i] = 0;
    if (int(threadIdx.x) < sets) {
      auto& head = m.heads[threadIdx.x];
      head.floor = head.worst = kFull, head.best = 0, head.groups = 0, head.placed = 0;
    }
    if (threadIdx.x == 0) m.warps[kFusedWarps] = 0;
    begin();

    uint16_t raw[kChunks * 4] = {};
    if (warp < p.group) load_raw(raw, p.query, row, kv_head * p.group + warp, p.page.words);
    auto fill = [&](int slot, int token, uint32_t block) {
      if (token < plan.length) ring.fill(slot, p.page, shape, run, token, plan.length, block);
    };
    int token = first_token(warp);
#pragma unroll
    for (int i = 0; i < kFusedStages; ++i) fill(i, token + i * stride, block[i]);
    uint32_t next_block = block_of(token + kFusedStages * stride, plan.length);
    float x[kChunks * 4];
    widen(x, raw, p.query.element);
    __syncthreads();
    encode_queries<kChunks, kMode>(p, x, queries);
    QueryFragments<kChunks, kMode, kQuads> query;
    query.load(m.planes, m.bias, p.head_quads);

    const Reader reader(shape);
    float best[kQuads][Reader::kSteps], worst[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) best[q][0] = best[q][1] = -INFINITY, worst[q] = INFINITY;
    float* to = m.scores + warp * kStageTokens + lane % 4 * s.score_stride + lane / 4 * kQuad;
    auto score_stage = [&](const Signatures<kChunks, kMode>(&signatures)[Reader::kSteps], auto whole) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
#pragma unroll
        for (int i = 0; i < Reader::kSteps; ++i) {
          float score[4];
          score_quad(query, signatures[i], q, score);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const bool here = decltype(whole)::value ||
                              uint32_t(token + reader.token[i] + j - p.num_sink_tokens) < uint32_t(plan.middle);
            worst[q] = fminf(worst[q], here ? score[j] : INFINITY);
            score[j] = here ? score[j] : -INFINITY;
            best[q][i] = fmaxf(best[q][i], score[j]);
          }
          if (q * 4 + lane % 4 < sets)
            *reinterpret_cast<float4*>(to + q * 4 * s.score_stride + i * Reader::kStep) =
                make_float4(score[0], score[1], score[2], score[3]);
        }
      }
    };
    // Of a stage up to here every token may be selected; where scoring is long code, one form serves all.
    constexpr bool kTwoForms = kMode != Mode::manhattan_sum;
    const int last_whole = shape.tokens == kStageTokens ? p.num_sink_tokens + plan.middle - kStageTokens : INT_MIN;
    int slot = 0;
    uint32_t phase = 0;
    for (; token < plan.length; token += stride, to += kFusedWarps * kStageTokens) {
      ring.wait(slot, phase);
      Signatures<kChunks, kMode> signatures[Reader::kSteps];
#pragma unroll
      for (int i = 0; i < Reader::kSteps; ++i) reader.load(signatures[i], ring.data(slot), i);
      if (kTwoForms && token >= p.num_sink_tokens && token <= last_whole) score_stage(signatures, std::true_type());
      else score_stage(signatures, std::false_type());
      __syncwarp();
      fill(slot, token + kFusedStages * stride, next_block);
      next_block = block_of(token + (kFusedStages + 1) * stride, plan.length);
      if (++slot == kFusedStages) slot = 0, phase ^= 1;
    }

    // The best and the worst score, and a floor: each group of scores has one at or above it. The
    // groups have to be as many as tokens are needed; the fewer of them, the better is their least.
    const int warps = min(s.cluster * kFusedWarps, plan.length / kStageTokens);
    int per_warp = 2;  // groups of a head: the scores of four lanes, two, one, or half of a lane's
    while (per_warp < 16 && per_warp * warps < plan.need) per_warp *= 2;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      float top = fmaxf(best[q][0], best[q][1]), bottom = worst[q];
      float floor = INFINITY;
      int groups = 0;
      auto add_group = [&](float x, int size) {
        if (x > -INFINITY) floor = fminf(floor, x), groups += size;
      };
      if (per_warp <= 8) {
        float x = top;
        if (per_warp <= 4) x = fmaxf(x, __shfl_xor_sync(kFull, x, 4));
        if (per_warp <= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, 8));
        add_group(x, (lane & (8 / per_warp - 1) * 4) == 0);
      } else {
        add_group(best[q][0], 1);
        add_group(best[q][1], 1);
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        groups += __shfl_xor_sync(kFull, groups, step);
        floor = fminf(floor, __shfl_xor_sync(kFull, floor, step));
        top = fmaxf(top, __shfl_xor_sync(kFull, top, step));
        bottom = fminf(bottom, __shfl_xor_sync(kFull, bottom, step));
      }
      const int head = q * 4 + lane;
      if (lane < 4 && head < sets && top > -INFINITY) {
        atomicMin(&m.heads[head].floor, order_key(floor));
        atomicMax(&m.heads[head].best, order_key(top));
        atomicMin(&m.heads[head].worst, order_key(bottom));
        atomicAdd(&m.heads[head].groups, uint32_t(groups));
      }
    }
    __syncthreads();
  }

  // Shows the warp's share of its set's own scores, four neighbours at a time, in order.
  template <class Visit>
  __device__ __forceinline__ void each_quad(Visit visit) const {
    const int begin = sub * part, end = min(begin + part, stages * kStageTokens);
    const float* scores = m.scores + set * s.score_stride;
    if (set < sets)
      for (int i = begin; i < end; i += 32 * kQuad) {
        const int at = i + lane * kQuad;
        float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (at < end) x = *reinterpret_cast<const float4*>(scores + at);
        float quad[4] = {x.x, x.y, x.z, x.w};
        visit(quad, at, at < end && at % kStageTokens < s.stage.tokens);
      }
  }

  // -- three exchanges: range, histogram, members of the edge bin --

  __device__ void find_range() {
    cluster_wait();  // the others run
    if (lane < sets)
      for (int r = warp; r < s.cluster; r += kFusedWarps) {
        const auto& head = m.heads[lane];
        remote_store16(remote(m.ranges + rank * sets + lane, r),
                       make_uint4(head.floor, head.best, head.worst, head.groups));
      }
    cluster_sync();
    if (warp < sets) {
      uint4 range = make_uint4(kFull, 0, kFull, 0);
      if (lane < s.cluster) range = m.ranges[lane * sets + warp];
      const uint32_t floor = __reduce_min_sync(kFull, range.x), top = __reduce_max_sync(kFull, range.y);
      const uint32_t bottom = __reduce_min_sync(kFull, range.z), groups = __reduce_add_sync(kFull, range.w);
      if (lane == 0) {
        auto& head = m.heads[warp];
        const float high = groups ? from_order_key(top) : 0.0f;
        head.low = groups ? from_order_key(groups >= uint32_t(plan.need) ? floor : bottom) : 0.0f;
        const float scale = high > head.low ? __fdividef(kEdgeBins - 1, high - head.low) : 0.0f;
        head.scale = scale < 3e38f ? scale : 0.0f;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool always_kept(int token) const {
    return token < p.num_sink_tokens || (token < plan.length && token >= plan.length - p.recent_window);
  }

  // Lists what may be selected, in an order that depends on nothing but the scores: those at or above
  // the floor, and tokens that are always kept as infinitely good.
  __device__ void list_candidates() {
    const float low = set < sets ? m.heads[set].low : 0;
    const bool any_kept = p.num_sink_tokens + p.recent_window > 0;
    uint2* list = m.candidates + warp * kCandidates;
    int listed = 0;
    each_quad([&](float(&x)[4], int index, bool here) {
      const int first = any_kept ? token_of(index) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (any_kept && here && x[j] == -INFINITY && always_kept(first + j)) x[j] = INFINITY;
        const bool take = here && x[j] >= low && x[j] > -INFINITY;
        const uint32_t takers = __ballot_sync(kFull, take);
        const int at = listed + __popc(takers & ((1u << lane) - 1));
        if (take && at < kCandidates) list[at] = make_uint2(__float_as_uint(x[j]), uint32_t(index + j));
        listed += __popc(takers);
      }
    });
    candidates = listed;
    __syncwarp();
  }

  // The same again: visit(score, index, whether it is one) by all lanes at a time, in order.
  template <class Visit>
  __device__ __forceinline__ void each_candidate(Visit visit) const {
    if (candidates <= kCandidates) {
      const uint2* list = m.candidates + warp * kCandidates;
      for (int i = 0; i < candidates; i += 32) {
        const bool here = i + lane < candidates;
        const uint2 entry = list[here ? i + lane : 0];
        visit(__uint_as_float(entry.x), int(entry.y), here);
      }
    } else {
      const float low = m.heads[set].low;
      each_quad([&](float(&x)[4], int index, bool here) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (here && x[j] == -INFINITY && always_kept(token_of(index) + j)) x[j] = INFINITY;
          visit(x[j], index + j, here && x[j] >= low && x[j] > -INFINITY);
        }
      });
    }
  }

  // The bin of each set's k-th best.
  __device__ void find_edge() {
    const int words = sets * kEdgeWords;
    list_candidates();
    if (set < sets) {
      const float low = m.heads[set].low, scale = m.heads[set].scale;
      uint32_t* counts = m.counts + set * kEdgeWords;
      each_candidate([&](float x, int, bool here) {
        if (!here || x == INFINITY) return;
        const int bin = edge_bin(x, low, scale);
        atomicAdd(counts + bin / 2, 1u << 16 * (bin % 2));
      });
    }
    __syncthreads();
    for (int r = warp; r < s.cluster; r += kFusedWarps) {
      const uint32_t to = remote(m.copies + rank * words, r);
      for (int i = lane; i < words / 4; i += 32) remote_store16(to + i * 16, reinterpret_cast<const uint4*>(m.counts)[i]);
    }
    cluster_sync();
    if (warp < sets && plan.need > 0) {  // a lane has four bins, lane 0 the highest
      uint32_t count[4] = {0, 0, 0, 0};
      const uint32_t* from = m.copies + warp * kEdgeWords;
#pragma unroll 4
      for (int r = 0; r < s.cluster; ++r) {
        const uint2 x = *reinterpret_cast<const uint2*>(from + r * words + kEdgeWords - 2 - 2 * lane);
        count[0] += x.y >> 16, count[1] += x.y & 0xffff, count[2] += x.x >> 16, count[3] += x.x & 0xffff;
      }
      const uint32_t mine = count[0] + count[1] + count[2] + count[3], need = plan.need;
      uint32_t sum = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(kFull, sum, step);
        if (lane >= step) sum += other;
      }
      uint32_t before = sum - mine, size = count[0];
      int edge = kEdgeBins - 1 - 4 * lane;
#pragma unroll
      for (int i = 1; i < 4; ++i)
        if (before + size < need) before += size, size = count[i], --edge;
      const int owner = __ffs(__ballot_sync(kFull, sum >= need)) - 1;
      edge = __shfl_sync(kFull, edge, max(owner, 0));
      // Members of the blocks in front of this one.
      const uint32_t theirs = lane < rank ? from[lane * words + edge / 2] >> 16 * (edge % 2) & 0xffff : 0;
      const uint32_t base = __reduce_add_sync(kFull, theirs);
      if (lane == owner) {
        auto& head = m.heads[warp];
        head.edge = edge, head.size = size, head.wanted = need - before, head.base = base;
        if (size > kMembers) m.warps[kFusedWarps] = 1;
      }
      if (owner < 0 && lane == 0) m.warps[kFusedWarps] = 1;
    }
    __syncthreads();
  }

  // The k-th best of each set: a selected token has a better score, or that one and is as recent.
  __device__ void find_threshold() {
    if (plan.need == 0) {
      if (int(threadIdx.x) < sets) m.heads[threadIdx.x].score = FLT_MAX, m.heads[threadIdx.x].token = INT_MAX;
      __syncthreads();
      return;
    }
    if (set < sets) {
      auto& head = m.heads[set];
      const float low = head.low, scale = head.scale;
      const int edge = head.edge;
      each_candidate([&](float x, int index, bool here) {
        if (!here || x == INFINITY || edge_bin(x, low, scale) != edge) return;
        const uint32_t at = head.base + atomicAdd(&head.placed, 1u);
        for (int r = 0; r < s.cluster; ++r)
          remote_store8(remote(m.members + set * kMembers + at, r), make_uint2(__float_as_uint(x), token_of(index)));
      });
    }
    cluster_sync();
    if (set < sets) {
      auto& head = m.heads[set];
      const uint2* members = m.members + set * kMembers;
      for (int i = sub * 32 + lane; i < head.size; i += warps_per_set * 32) {
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

  // The same by radix passes over (score, token): for any scores.
  static __device__ __noinline__ void search_slowly(const DecodeParams& p, const FusedShape& s, uint8_t* memory) {
    Fused(p, s, memory).search();
  }
  __device__ void search() {
    const int bits = token_bits(plan.length);
    if (int(threadIdx.x) < sets) m.heads[threadIdx.x].prefix = 0, m.heads[threadIdx.x].need = plan.need;
    int parity = 0;
    for (int shift = 32 + bits; shift > 0; parity ^= 1) {
      const int above = shift;
      shift = max(shift - 7, 0);
      uint32_t* bins = m.wide + parity * sets * kEdgeBins;
      for (int i = threadIdx.x; i < sets * kEdgeBins; i += kFusedThreads) bins[i] = 0;
      __syncthreads();
      each_quad([&](float(&x)[4], int index, bool) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (x[j] == -INFINITY) continue;
          const uint64_t value = ranked(order_key(x[j]), token_of(index + j), bits);
          if (value >> above == m.heads[set].prefix)
            atomicAdd(bins + set * kEdgeBins + (uint32_t(value >> shift) & ((1u << (above - shift)) - 1)), 1u);
        }
      });
      cluster_sync();
      if (warp < sets) {  // a lane has four bins, lane 0 the highest
        uint32_t count[4] = {0, 0, 0, 0};
        for (int r = 0; r < s.cluster; ++r) {
          const uint4 x = remote_load16(remote(bins + warp * kEdgeBins + (31 - lane) * 4, r));
          count[0] += x.w, count[1] += x.z, count[2] += x.y, count[3] += x.x;
        }
        const uint32_t mine = count[0] + count[1] + count[2] + count[3], need = m.heads[warp].need;
        uint32_t sum = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const uint32_t other = __shfl_up_sync(kFull, sum, step);
          if (lane >= step) sum += other;
        }
        uint32_t before = sum - mine, size = count[0], digit = (31 - lane) * 4 + 3;
#pragma unroll
        for (int i = 1; i < 4; ++i)
          if (before + size < need) before += size, size = count[i], --digit;
        __syncwarp();
        if (sum >= need && sum - mine < need) {  // one lane
          m.heads[warp].need = need - before;
          m.heads[warp].prefix = m.heads[warp].prefix << (above - shift) | digit;
        }
      }
      __syncthreads();
    }
    if (int(threadIdx.x) < sets) {
      auto& head = m.heads[threadIdx.x];
      head.score = from_order_key(uint32_t(head.prefix >> bits));
      head.token = int(head.prefix & ((1ull << bits) - 1));
    }
    cluster_sync();  // the others have read the histograms, which lie where addresses will
  }

  // -- attention over the own tokens --

  __device__ void load_query(Softmax& softmax, int head, int heads) const {
    softmax.e5m2 = p.page.element == Element::e5m2;
    softmax.load_query(static_cast<const T*>(p.query.data) + row * p.query.token_stride +
                           (kv_head * p.group + head) * p.query.head_stride,
                       p.query.head_stride, heads);
    softmax.reset();
  }

  __device__ void attend_selected(Softmax& softmax) {
    const int own = min(set, sets - 1);
    load_query(softmax, p.per_query_head ? own : 0, p.per_query_head ? 1 : p.group);
    const float score = m.heads[own].score;
    const int token = m.heads[own].token;
    auto chosen = [&](float x, int index, bool here) {
      return here && (x > score || (x == score && token_of(index) >= token));
    };
    int count = 0;
    each_candidate([&](float x, int index, bool here) { count += __popc(__ballot_sync(kFull, chosen(x, index, here))); });
    if (lane == 0) m.warps[warp] = count;
    __syncthreads();
    int before = 0, total = 0;  // of the set
    for (int w = 0; w < warps_per_set && set < sets; ++w) {
      const int other = m.warps[set * warps_per_set + w];
      if (w < sub) before += other;
      total += other;
    }
    if (sub == 0 && lane == 0 && set < sets) m.heads[set].active = min(warps_per_set, (total + 15) / 16);
    const int room = kTokens / sets;
    int* tokens = m.tokens + own * room;
    const int32_t* blocks = p.block_table + row * p.blocks_per_row;
    const uint8_t* base = p.page.base + kv_head * p.page.head_stride;
    auto row_of = [&](int token) {
      const int block = block_of_quad(p.page, token / kQuad);
      return base + __ldg(blocks + block) * int64_t(p.page.block_stride) +
             (token - block * p.page.block_size) * kRowBytes;
    };
    for (int round = 0;; round += room) {
      int at = before - round;
      each_candidate([&](float x, int index, bool here) {
        const bool take = chosen(x, index, here);
        const uint32_t takers = __ballot_sync(kFull, take);
        const int to = at + __popc(takers & ((1u << lane) - 1));
        if (take && uint32_t(to) < uint32_t(room)) tokens[to] = token_of(index);
        at += __popc(takers);
      });
      __syncthreads();
      const int here = min(total - round, room);
      for (int chunk = sub * 16; chunk < here; chunk += warps_per_set * 16)
        softmax.step([&](int slot) { return row_of(tokens[min(chunk + slot, here - 1)]); }, p.page.v_offset, 0,
                     here - chunk, p.softmax_scale);
      if (!__syncthreads_or(total > round + room)) break;
    }
  }

  __device__ void attend_all(Softmax& softmax) {
    load_query(softmax, 0, p.group);
    const int32_t* blocks = p.block_table + row * p.blocks_per_row;
    const uint8_t* base = p.page.base + kv_head * p.page.head_stride;
    const int chunks = (plan.length + 15) / 16;
    for (int i = plan.first / 16 + rank + warp * s.cluster; i < chunks; i += s.cluster * kFusedWarps) {
      const int token = i * 16, block = block_of_quad(p.page, token / kQuad);
      const uint8_t* run = base + __ldg(blocks + block) * int64_t(p.page.block_stride) +
                           (token - block * p.page.block_size) * kRowBytes;
      const int last = min(16, plan.length - token) - 1, begin = max(plan.first - token, 0);
      softmax.step([&](int slot) { return run + min(max(slot, begin), last) * kRowBytes; }, p.page.v_offset, begin,
                   last + 1, p.softmax_scale);
    }
    if (threadIdx.x == 0) m.heads[0].active = kFusedWarps;
  }

  __device__ void merge(Softmax& softmax) {
    softmax.finish();
    const bool by_set = plan.sparse && p.per_query_head;
    const int columns = by_set ? 1 : p.group;
    softmax.share(m.states, 0, columns);
    __syncthreads();
    const int outputs = p.group * D, own = (outputs + s.cluster - 1) / s.cluster;
    for (int i = threadIdx.x; i < outputs; i += kFusedThreads) {
      const int head = i / D, d = i % D;
      const float* from = m.states + head * (by_set ? warps_per_set : 1) * Softmax::kHeadFloats;
      const int step = columns * Softmax::kHeadFloats, active = m.heads[by_set ? head : 0].active;
      float best = -INFINITY, value = 0, total = 0;
      if (active == 1) {
        best = from[0], total = from[1], value = from[4 + d];
      } else {
        for (int w = 0; w < active; ++w) best = fmaxf(best, from[w * step]);
        for (int w = 0; w < active; ++w) {
          const float weight = exp2f(from[w * step] - (best == -INFINITY ? 0.0f : best));
          value += weight * from[w * step + 4 + d];
          total += weight * from[w * step + 1];
        }
      }
      const int to = i / own;
      remote_store(remote(m.partial + rank * own + i - to * own, to), value);
      if (d < s.cluster)
        remote_store8(remote(m.softmax + rank * p.group + head, d),
                      make_uint2(__float_as_uint(best), __float_as_uint(total)));
    }
    cluster_sync();
    // Eight lanes add up the parts of a large cluster, one those of a small one.
    const int lanes = s.cluster > 4 ? 8 : 1;
    for (int i = threadIdx.x / lanes; i < (own + 31) / 32 * 32; i += kFusedThreads / lanes) {
      const int at = min(rank * own + i, outputs - 1), head = at / D;
      float best = -INFINITY, value = 0, total = 0;
      for (int r = lane % lanes; r < s.cluster; r += lanes) best = fmaxf(best, m.softmax[r * p.group + head].x);
      for (int step = 1; step < lanes; step *= 2) best = fmaxf(best, __shfl_xor_sync(kFull, best, step));
      for (int r = lane % lanes; r < s.cluster; r += lanes) {
        const float2 state = m.softmax[r * p.group + head];
        const float weight = exp2f(state.x - (best == -INFINITY ? 0.0f : best));
        value += weight * m.partial[r * own + min(i, own - 1)];
        total += weight * state.y;
      }
      for (int step = 1; step < lanes; step *= 2) {
        value += __shfl_xor_sync(kFull, value, step);
        total += __shfl_xor_sync(kFull, total, step);
      }
      if (lane % lanes == 0 && i < own && rank * own + i < outputs)
        output_of(head)[at % D] = T(total == 0 ? 0.0f : value / total * p.page.v_scale);
    }
  }
};

template <int D, class T, bool kFp8, Mode kMode, int kQuads>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ FusedShape s) {
  extern __shared__ __align__(16) uint8_t fused_memory[];
  Fused<D, T, kFp8, kMode, kQuads>(p, s, fused_memory).run();
}

// Launches the kernel, or without a stream counts the clusters that the device runs at once.
template <int D>
int fused_head_size(const DecodeParams& p, const FusedShape& s, void* stream, bool count) {
  int clusters = 0;
  auto launch_it = [&](auto element, auto mode, auto quads, auto fp8) {
    constexpr auto* kernel =
        fused_kernel<D, decltype(element), decltype(fp8)::value, decltype(mode)::value, decltype(quads)::value>;
    const dim3 grid(s.cluster, p.page.num_kv_heads, p.num_rows);
    if (count) clusters = count_clusters(kernel, s.cluster, kFusedThreads, s.bytes, "fused");
    else launch_clusters(kernel, grid, s.cluster, kFusedThreads, s.bytes, stream, p.overlap, "fused", p, s);
  };
  auto run = [&](auto element, auto mode, auto quads) {
    if (p.page.fp8()) launch_it(element, mode, quads, std::true_type());
    else launch_it(element, mode, quads, std::false_type());
  };
  auto by_mode = [&](auto element) {
    using std::integral_constant;
    using One = integral_constant<int, 1>;
    if (p.mode == Mode::manhattan_sum) return run(element, integral_constant<Mode, Mode::manhattan_sum>(), One());
    auto by_quads = [&](auto mode) {
      if (p.head_quads == 1) return run(element, mode, One());
      run(element, mode, integral_constant<int, 2>());
    };
    if (p.mode == Mode::dot) return by_quads(integral_constant<Mode, Mode::dot>());
    by_quads(integral_constant<Mode, Mode::manhattan>());
  };
  if (p.query.element == Element::bf16) by_mode(__nv_bfloat16());
  else by_mode(__half());
  return clusters;
}

extern template int fused_head_size<64>(const DecodeParams&, const FusedShape&, void*, bool);
extern template int fused_head_size<128>(const DecodeParams&, const FusedShape&, void*, bool);

}  // namespace adamas
