// Parameters of the kernels. Those of a layer are filled when it is bound (layer.cu), the others in each call (api.cu).
#pragma once
#include <cstdint>

#include "common/coding.h"
#include "common/element.h"
#include "common/page.h"
#include "sm90/target.h"

namespace adamas {

// A thread scores four neighbouring tokens (a token quad) for one head of four (a head quad), because of the layout
// of the binary tensor core's fragments.
constexpr int kQuad = 4;
constexpr int kMaxHeadQuads = 4;
constexpr int kMaxGroup = kQuad * kMaxHeadQuads;  // query heads per KV head
constexpr int kByteWords = 8;  // words that the 32 dimensions of a word take in bytes
// Limits of the kernels, which Python reads (limits in api.cu): tokens of a context, whose bitmap must fit shared
// memory; tokens of a block; rows of a step; blocks of a cluster; and rows * KV heads * tokens of the longest
// context, whose stages scan counts in 32 bits.
// Shared memory that a block has on every GPU of the library, 99 KiB on sm_86, sm_89 and sm_120, bounds both.
constexpr int kBlockMemory = (kHopper ? 227 : 99) * 1024;
constexpr int kMaxContext = kHopper ? 1 << 20 : 1 << 18, kMaxRows = kHopper ? 8192 : 2048;
constexpr int kMaxBlock = 1 << 16, kMaxCluster = 16;
// Tokens that a round of the fused kernel selects, and (row, KV head)s that may share dense rows there.
constexpr int kMostWanted = 1024, kTickets = 1024;
constexpr int64_t kMaxStep = int64_t(1) << 37;
constexpr int kRunRows = 4;  // most rows of a request that scan takes together
// Planes of an encoded query: 2 with two bits each (dot) or 3 thermometer planes (manhattan).
constexpr int kMaxQueryPlanes = 3;
constexpr double kLog2E = 1.4426950408889634;

// The counter of token sets whose selection took more than one pass.
constexpr int kSearchedAgain = 4;

// dot; manhattan per query head; manhattan summed over the query heads of a KV head; the maximum over them (maximum.cuh)
// of dot.
enum class Mode : int { dot, manhattan, manhattan_sum, dot_max };
ADAMAS_BOTH constexpr bool is_dot(Mode mode) { return mode == Mode::dot || mode == Mode::dot_max; }

// A query head's logit in base 2 is score * factor; log_sum is the log-sum-exp of a sample of them.
struct HeadWeight {
  float factor, log_sum;
};

// How a page and a token in it are located.
struct PageAddress {
  uint8_t* base;
  uint32_t block_stride;  // bytes
  int64_t head_stride;    // bytes
  int block_size;
  uint32_t quad_magic;  // ceil(2^32 / token quads of a block)
  int head_size, words, num_kv_heads;
};

// The pages of one layer.
struct Page : PageAddress, PageLayout {};

struct AppendParams {
  Page page;
  Coding coding;
  Rows key, value;
  const int64_t* slots;
  int64_t num_tokens, num_slots;  // num_slots: slots in the cache; later and negative ones are skipped
  float norm;             // factor of the Hadamard transform
  const float* key_mean;  // [num_kv_heads, head_size], transformed; null is zero
};

struct GatherParams {
  Page page;
  Rows key, value;
  const int32_t* block_table;
  int64_t blocks_per_row;
  const int32_t* seq_lens;
  int num_rows, max_seq_len;
  int64_t num_tokens;  // tokens in key and value
};

// What encode passes to scan, and scan to attend. `set` is row * score heads + score head, `group` is
// row * num_kv_heads + KV head.
struct Workspace {
  uint32_t* tickets;      // [kTickets] `arrived` of the fused kernel, which no kernel uses otherwise
  uint32_t* planes;       // [group][head quad][plane][chunk of 4 words][32 lanes] query planes
  int32_t* bias;          // [group][head quad][4] integer constant of a head's score
  uint32_t* bytes;        // [group][head quad][chunk][4 heads][4 words][byte words], for shared scans (shared.cuh)
  HeadWeight* weights;    // [group][head quad][4], for dot_max
  float* pivot_score;     // [set] tokens below (score, token) are not candidates
  int32_t* pivot_token;   // [set]
  float* pivot_scale;     // [set] selection bins per unit of score above the pivot, or 0
  uint32_t* count;        // [set] candidates found, may exceed the capacity
  uint2* candidates;      // [set][capacity] score (float), token
  uint32_t* arrived;      // [group] dense workers that have finished; 0 before and after a step
  uint32_t* pieces;       // [1] pieces of work that scan has handed out
  float* partials;        // [dense worker + group] softmax partials of dense rows
};

struct DecodeParams {
  Page page;
  Coding coding;
  Rows query, output;
  const int32_t* block_table;  // [rows, blocks_per_row]
  int64_t blocks_per_row;
  const int32_t* seq_lens;  // [rows]
  const int32_t* budgets;       // [rows]
  const int32_t* positions;     // [rows] a row's place among the rows of its request, if scan is shared; or null
  int num_rows, num_query_heads, group, score_heads_per_kv, head_quads;
  int max_seq_len;  // upper bound of all rows, which workspaces and the block table hold
  float softmax_scale, norm;
  float logit_scale;  // softmax scale in base 2 of values that are not fp8
  float soft_cap;     // of the logits in base 2; 0 caps nothing
  const float* sinks;  // [num_query_heads] natural logits that only add to the denominator; null is none
  float* lse;          // [rows, num_query_heads], written unless null: see Backend.decode
  Mode mode;
  bool per_query_head;
  int num_sink_tokens, recent_window, sliding_window;
  int least_budget;  // sinks and recent window, at least one token; 0 if scan runs alone
  bool overlap;  // lengths, budgets and block table were complete before the preceding kernel started
  int capacity;  // candidates per set
  int dense_workers;
  int sample_bits;  // log2 of the most tokens of a context that encode samples
  // [5]: sparse rows, dense rows, context and attended tokens (over query heads), then kSearchedAgain
  int64_t* stats;
  // if scan runs alone: all scores, no candidates
  float* scores;
  int64_t scores_row_stride, scores_head_stride;
  Workspace work;
};

void append(const AppendParams& p, void* stream);
void gather(const GatherParams& p, void* stream);
void encode(const DecodeParams& p, void* stream);
void scan(const DecodeParams& p, void* stream);
// The same where p.positions is set: the rows of a request together. scan_shares() tells whether they may.
void scan_shared(const DecodeParams& p, void* stream);
bool scan_shares(const DecodeParams& p);
void attend(const DecodeParams& p, void* stream);
int max_sample_bits(const DecodeParams& p);  // log2 of the largest sample that fits the shared memory of encode
// The whole step in one kernel, with a cluster of blocks of `warps` warps (8 or 16) per (row, KV head).
void fused(DecodeParams p, int cluster, int warps, void* stream);
bool fused_fits(const DecodeParams& p, int cluster, int warps);     // whether the kernel supports the shape
int fused_clusters(const DecodeParams& p, int cluster, int warps);  // clusters that run at once; 0 if not supported
int64_t workspace(DecodeParams& p, uint8_t* base);       // assigns p.work; returns its size in bytes

}  // namespace adamas
