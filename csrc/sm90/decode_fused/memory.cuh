// The shared memory of a block of the fused kernel. fused.cu computes the offsets.
#pragma once
#include "sm90/pipeline.cuh"

namespace adamas {

constexpr int kFusedThreads = 256, kFusedWarps = kFusedThreads / 32;
constexpr int kFusedGroup = kFusedWarps;  // most query heads per KV head: one warp each
constexpr int kFusedStages = 3;           // stages of a warp's ring
constexpr int kEdgeBins = 128, kEdgeWords = kEdgeBins / 2;  // two 16-bit counts per word
constexpr int kMembers = 256;                               // most members of a token set's edge bin
constexpr int kCandidates = 512;                            // most candidates that a warp lists
constexpr int kTokens = 2048;                               // selected tokens at a time, over the token sets

// The range of a block's own scores of one token set, as order keys, and the groups that its floor is taken from.
struct alignas(16) FusedRange {
  uint32_t floor, best, groups;
  uint32_t high_floor;  // the largest of the warps' floors
};

// The search for one token set's k-th best score.
struct FusedHead {
  FusedRange range;
  float low, scale;       // map a score to its bin
  int size, wanted, edge;  // the edge bin: members, members to select, index
  uint32_t base, placed;  // first place of the block's own members, and members placed
  bool exact;             // the edge bin is the range [from, to] of ranks (score, token)
  uint64_t from, to;
  float score;  // the k-th best, score and token
  int token;
  int active;  // warps that attended
};

// log2 of the ranks per bin if a range of ranks is divided into kEdgeBins bins.
__device__ __forceinline__ int range_shift(const FusedHead& head) {
  return max(0, 57 - __clzll(static_cast<long long>(head.to - head.from)));
}
static_assert(kEdgeBins == 1 << 7);

struct FusedShape {
  int cluster;  // blocks
  int warps_per_set, set_magic;  // warp * set_magic / 256 is a warp's token set
  int score_stride, stage_bytes;
  uint32_t round_magic;  // ceil(2^32 / token quads of one stage per block)
  StageShape stage;
  // Offsets in shared memory. When the scores are complete, selected tokens, candidates and the warps' softmax
  // states reuse the memory of the ring. The scratch of query encoding uses the memory of the scores.
  int states, scores, counts, copies, ranges, parts, members, planes, bias, weights, tops, partial, softmax, barriers, heads,
      warps, bytes;
};

struct FusedMemory {
  uint8_t* ring;
  int* tokens;        // [set][kTokens / sets] selected
  uint2* candidates;  // [warp][kCandidates] score, index
  float* states;      // [warp][head][top, sum, -, -, D values]
  float* scores;      // [set][score_stride]
  uint32_t* counts;   // [set][kEdgeWords] histograms of the block
  uint32_t* copies;   // [block][set][kEdgeWords] histograms of the cluster
  FusedRange* ranges;  // [block][set]; later the least and largest score of an edge bin as order keys, and the number
                       // of members with the largest one
  uint4* parts;        // [warp] likewise
  uint64_t* members;  // [set][kMembers] ranks (score, token) of the edge bin
  uint32_t* planes;   // encoded queries
  int32_t* bias;      // [kMaxHeadQuads][4]
  HeadWeight* weights;     // [kMaxHeadQuads][4], for dot_max, as are tops and sums
  uint32_t *tops, *sums;   // [kMaxHeadQuads][4] largest logit of the sample as an order key, sum of its terms
  float* partial;     // [block][outputs of this block] weighted V sums
  float2* softmax;    // [block][query head] top, sum
  uint64_t* barriers;
  FusedHead* heads;   // [set]
  int* warps;         // selected tokens of each warp, and whether the histogram search failed

  __device__ FusedMemory(const FusedShape& s, uint8_t* m)
      : ring(m), tokens(reinterpret_cast<int*>(m)), candidates(reinterpret_cast<uint2*>(m + kTokens * 4)),
        states(reinterpret_cast<float*>(m + s.states)),
        scores(reinterpret_cast<float*>(m + s.scores)),
        counts(reinterpret_cast<uint32_t*>(m + s.counts)), copies(reinterpret_cast<uint32_t*>(m + s.copies)),
        ranges(reinterpret_cast<FusedRange*>(m + s.ranges)),
        parts(reinterpret_cast<uint4*>(m + s.parts)), members(reinterpret_cast<uint64_t*>(m + s.members)),
        planes(reinterpret_cast<uint32_t*>(m + s.planes)), bias(reinterpret_cast<int32_t*>(m + s.bias)),
        weights(reinterpret_cast<HeadWeight*>(m + s.weights)), tops(reinterpret_cast<uint32_t*>(m + s.tops)),
        sums(tops + 4 * kMaxHeadQuads),
        partial(reinterpret_cast<float*>(m + s.partial)), softmax(reinterpret_cast<float2*>(m + s.softmax)),
        barriers(reinterpret_cast<uint64_t*>(m + s.barriers)), heads(reinterpret_cast<FusedHead*>(m + s.heads)),
        warps(reinterpret_cast<int*>(m + s.warps)) {}

  __device__ __forceinline__ int& search_failed() const { return warps[kFusedWarps]; }
};

}  // namespace adamas
