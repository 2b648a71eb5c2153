// Parameters of the CPU kernels. api.cc fills those of a layer when it is bound, and the others in each call.
#pragma once
#include <cstdint>

#include "common/coding.h"
#include "common/page.h"

namespace adamas {

constexpr int kMaxWords = 512 / kWord;

// Floats of a query or an output in lane order: whole pairs of vectors in every instruction set.
constexpr int padded_size(int head_size) { return (head_size + 31) / 32 * 32; }

// One layer's pages.
struct Page : PageLayout {
  uint8_t* base;
  int64_t block_stride, head_stride;  // bytes
  int block_size, head_size, num_kv_heads;

  int padded_size() const { return adamas::padded_size(head_size); }
  uint8_t* run(int64_t block, int kv_head) const {
    return base + block * block_stride + kv_head * head_stride;
  }
};

struct AppendParams {
  Page page;
  Coding coding;
  Rows key, value;
  const float* key_mean;  // [num_kv_heads, coded size], transformed; null is zero
  const int64_t* slots;
  int64_t num_tokens;
};

struct DecodeParams {
  Page page;
  Coding coding;
  Rows query, output;
  const int32_t* block_table;  // [rows, blocks_per_row]
  int64_t blocks_per_row;
  const int32_t* seq_lens;  // [rows]
  const int32_t* budgets;       // [rows]
  int num_rows, num_query_heads;
  float softmax_scale, logit_scale;
  float soft_cap;      // of the scaled logits; 0 caps nothing
  const float* sinks;  // [num_query_heads], logits that only add to the denominator; null is none
  float* lse;          // [rows, num_query_heads], written unless null: see Backend.decode
  bool dot, per_query_head, maximum;
  int num_sink_tokens, recent_window, sliding_window;
  // [5]: sparse rows, dense rows, context tokens, attended tokens (over query heads); the last is for devices that
  // may select twice
  int64_t* stats;

  // Tokens that a sparse row attends to: at least sinks and recent window, and at least one.
  int budget(int row) const {
    const int kept = num_sink_tokens + recent_window, least = kept > 1 ? kept : 1;
    return budgets[row] > least ? budgets[row] : least;
  }

  int group() const { return num_query_heads / page.num_kv_heads; }
  bool summed() const { return dot && !per_query_head && !maximum; }  // dot is linear, so queries are summed
  int score_heads() const { return per_query_head ? num_query_heads : page.num_kv_heads; }
  const int32_t* blocks(int row) const { return block_table + row * blocks_per_row; }
};

}  // namespace adamas
