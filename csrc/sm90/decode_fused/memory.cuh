// The shared memory of a block of the fused kernel. fused.cu computes the offsets.
#pragma once
#include "sm90/pipeline.cuh"

namespace adamas {

// Warps of a block. A multiprocessor runs one block of kMostWarps or two of kLeastWarps.
constexpr int kLeastWarps = 8, kMostWarps = 16;
constexpr int kFusedGroup = kLeastWarps;  // most query heads per KV head: one warp each
constexpr int kFusedStages = 3;           // stages of a warp's ring
constexpr int kEdgeBins = 128, kEdgeWords = kEdgeBins / 2;  // two 16-bit counts per word
constexpr int kFineBins = 96, kCoarse = 8;                  // of these; the others are so many times as wide (edge_bin)
constexpr int kMembers = 256;                               // most members of the edge bin
constexpr int kList = kMostWanted + 2 * kStageTokens;       // places of a warp's list

// With combine=max the scores of the sample are counted in bins of equal width. Scores are logarithms to base 2 there, and 0
// is the mean of a head's weights.
constexpr int kSampledBins = 256;
constexpr float kSampledLow = -36.0f, kSampledWidth = 0.1875f;

// The range of a block's scores, as order keys.
struct alignas(16) FusedRange {
  uint32_t best;   // the best score
  uint32_t floor;  // the least of the best scores of `groups` groups of tokens
  uint32_t groups;
  uint32_t high;   // the largest floor or quarter of a warp, see merge_range
  uint32_t pivot;  // the largest of the warps' pivots; at least as many tokens as are wanted reach it
  uint32_t unused[3];
};

// The search for the k-th best score.
struct FusedSearch {
  FusedRange range;        // of the block
  float low, scale;        // map a score to its bin
  bool enough;             // as many tokens as are wanted reach `low`
  int size, wanted, edge;  // the edge bin: members, members to select, index
  uint32_t base, placed;   // first place of the block's own members, and members placed
  bool exact;              // the edge bin is the range [from, to] of ranks (score, token)
  bool failed;             // the edge bin has more members than exchange 3 takes
  uint64_t from, to;
  float score;  // the k-th best, score and token
  int token;
  int active;      // warps that attended
  bool any_dense;  // the step has a dense row
};

// log2 of the ranks per bin if a range of ranks is divided into kEdgeBins bins.
__device__ __forceinline__ int range_shift(const FusedSearch& search) {
  return max(0, 57 - __clzll(static_cast<long long>(search.to - search.from)));
}
static_assert(kEdgeBins == 1 << 7);

struct FusedShape {
  int cluster, num_warps;  // blocks of a cluster, warps of a block
  int stage_bytes;
  StageShape stage;
  int stride;                      // tokens between the starts of consecutive stages of a warp:
  int stride_blocks, stride_rest;  // so many blocks and tokens
  // Offsets in shared memory. When the lists are complete, the selected tokens and the warps' softmax states reuse the
  // memory of the ring. The scratch of query encoding uses the memory of the lists.
  int states, scores, indices, counts, copies, ranges, posts, parts, members, planes, bias, weights, tops, partial, softmax,
      barriers, search, warps, sampled, bytes;
};

struct FusedMemory {
  uint8_t* ring;
  int* tokens;         // [kMostWanted] selected
  float* states;       // [warp][head][top, sum, -, -, D values]
  float* scores;       // [warp][kList] listed tokens: scores, and indices (list.cuh)
  uint16_t* indices;   // [warp][kList]
  uint32_t* counts;    // [kEdgeWords] histogram of the block
  uint32_t* copies;    // [block][kEdgeWords] histograms of the cluster
  FusedRange* ranges;  // [block]
  uint32_t* posts;     // [warp] order keys that a warp's share of the wanted tokens reach (list.cuh)
  uint4* parts;        // [warp], then [block]: least and largest score of the edge bin, members with the largest one
  uint64_t* members;   // [kMembers] ranks (score, token) of the edge bin
  uint32_t* planes;    // encoded queries
  int32_t* bias;       // [kMaxHeadQuads][4]
  HeadWeight* weights;    // [kMaxHeadQuads][4], for dot_max, as are tops and sums
  uint32_t *tops, *sums;  // [kMaxHeadQuads][4] largest logit of the sample as an order key, sum of its terms
  uint32_t* sampled;      // [kSampledBins] histogram of the sample's scores, for dot_max
  float* partial;      // [block][outputs of this block] weighted V sums
  float2* softmax;     // [block][query head] top, sum
  uint64_t* barriers;
  FusedSearch& search;
  int* warps;  // selected tokens of each warp

  __device__ FusedMemory(const FusedShape& s, uint8_t* m)
      : ring(m), tokens(reinterpret_cast<int*>(m)), states(reinterpret_cast<float*>(m + s.states)),
        scores(reinterpret_cast<float*>(m + s.scores)), indices(reinterpret_cast<uint16_t*>(m + s.indices)),
        counts(reinterpret_cast<uint32_t*>(m + s.counts)), copies(reinterpret_cast<uint32_t*>(m + s.copies)),
        ranges(reinterpret_cast<FusedRange*>(m + s.ranges)), posts(reinterpret_cast<uint32_t*>(m + s.posts)),
        parts(reinterpret_cast<uint4*>(m + s.parts)),
        members(reinterpret_cast<uint64_t*>(m + s.members)), planes(reinterpret_cast<uint32_t*>(m + s.planes)),
        bias(reinterpret_cast<int32_t*>(m + s.bias)), weights(reinterpret_cast<HeadWeight*>(m + s.weights)),
        tops(reinterpret_cast<uint32_t*>(m + s.tops)), sums(tops + 4 * kMaxHeadQuads),
        sampled(reinterpret_cast<uint32_t*>(m + s.sampled)),
        partial(reinterpret_cast<float*>(m + s.partial)), softmax(reinterpret_cast<float2*>(m + s.softmax)),
        barriers(reinterpret_cast<uint64_t*>(m + s.barriers)),
        search(*reinterpret_cast<FusedSearch*>(m + s.search)), warps(reinterpret_cast<int*>(m + s.warps)) {}
};

}  // namespace adamas
