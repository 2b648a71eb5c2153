// Parameters of the CPU kernels, filled once per call on the host side (binding.cc).
#pragma once
#include <cstdint>

namespace adamas {

// A tile is 16 tokens: one uint32 word (32 dimensions) of 16 tokens fills a 512-bit register.
constexpr int kTile = 16;
constexpr int kWord = 32;
constexpr int kMaxHeadSize = 256;
constexpr int kMaxWords = kMaxHeadSize / kWord;
// Bits of the query in the dot score: two's complement planes, the last one negative.
constexpr int kQueryBits = 4;
constexpr int kQueryMax = (1 << (kQueryBits - 1)) - 1;

enum class Element : int { f32, bf16, f16, e4m3, e5m2 };

// One layer's pages; offsets are bytes inside a (block, KV head) run, see vllm_adamas/layout.py.
struct Page {
  uint8_t* base;
  int64_t block_stride, head_stride;  // bytes
  int block_size, head_size, num_kv_heads;
  int64_t v_offset, hi_offset, lo_offset, scale_offset;
  Element element;
  float k_scale, v_scale;  // fp8 to real

  uint8_t* run(int64_t block, int kv_head) const {
    return base + block * block_stride + kv_head * head_stride;
  }
};

struct Coding {
  float threshold;
  bool relative;  // in units of the vector's RMS
};

// A dense [tokens, heads, head_size] tensor; strides in elements.
struct Rows {
  void* data;
  int64_t token_stride, head_stride;
  Element element;
};

struct AppendParams {
  Page page;
  Coding coding;
  Rows key, value;
  const float* key_mean;  // [num_kv_heads, head_size], transformed; null is zero
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
  float softmax_scale;
  bool dot, per_query_head;
  int num_sink_tokens, recent_window, sliding_window;
  int64_t* stats;  // sparse rows, dense rows, context tokens, attended tokens (over query heads)

  // Tokens that a row attends to, if it is sparse: what is always kept counts, and one at least.
  int budget(int row) const {
    const int kept = num_sink_tokens + recent_window, least = kept > 1 ? kept : 1;
    return budgets[row] > least ? budgets[row] : least;
  }

  int group() const { return num_query_heads / page.num_kv_heads; }
  int score_heads() const { return per_query_head ? num_query_heads : page.num_kv_heads; }
  const int32_t* blocks(int row) const { return block_table + row * blocks_per_row; }
};

}  // namespace adamas
