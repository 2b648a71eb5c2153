// The functions that Python sees (backends/cpu/__init__.py checks shapes and fills the arguments).
// tvm-ffi passes tensors by DLPack, so one library serves every CPython and PyTorch.
#include <algorithm>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

#include "cpu/kernels.h"

namespace adamas {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

const Kernels* active = find_kernels("auto");

String use_isa(String name) {
  const Kernels* found = find_kernels(name.c_str());
  if (!found) TVM_FFI_THROW(ValueError) << "this processor cannot run the kernels called " << name.c_str();
  active = found;
  return String(active->name);
}

// What a caller got wrong, as one sentence that names the argument and the constraint.
void expect(bool holds, const char* constraint) {
  if (!holds) TVM_FFI_THROW(ValueError) << constraint;
}
bool is_int(const TensorView& t, int bits) { return t.dtype().code == kDLInt && t.dtype().bits == bits; }

Element element_of(const TensorView& t, const char* constraint) {
  const DLDataType type = t.dtype();
  if (type.code == kDLFloat && type.bits == 32) return Element::f32;
  if (type.code == kDLFloat && type.bits == 16) return Element::f16;
  expect(type.code == kDLBfloat, constraint);
  return Element::bf16;
}

// int32 [rows]; any number of rows when negative
const int32_t* row_numbers(const TensorView& t, const char* constraint, int64_t rows = -1) {
  expect(t.ndim() == 1 && is_int(t, 32) && t.stride(0) == 1 && (rows < 0 || t.size(0) == rows), constraint);
  return static_cast<const int32_t*>(t.data_ptr());
}

// [tokens, heads, head_size]
Rows rows_of(const TensorView& t, int64_t tokens, int64_t heads, int64_t head_size, const char* constraint) {
  expect(t.ndim() == 3 && t.size(0) >= tokens && t.size(1) == heads && t.size(2) == head_size &&
             t.stride(2) == 1,
         constraint);
  return Rows{t.data_ptr(), t.stride(0), t.stride(1), element_of(t, constraint)};
}

// page: [num_blocks, num_kv_heads, block_size, content], each (block, head) one run; offsets: V, hi, lo, scale.
Page page_of(const TensorView& page, int64_t block_size, int64_t head_size, int64_t v_offset,
             int64_t hi_offset, int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale,
             double v_scale) {
  const int64_t size = page.dtype().bits / 8, token_bytes = scale_offset / block_size + 2;
  const int64_t content = (token_bytes + size - 1) / size;
  expect(page.ndim() == 4 && page.size(2) == block_size && page.size(3) == content &&
             page.stride(2) == content && page.stride(3) == 1,
         "page: expected [blocks, Hkv, N, C] with N and C of the layout, and dense in both");
  expect(block_size * content * size < int64_t(1) << 31, "page: a block of one KV head spans 2 GiB or more");
  return Page{static_cast<uint8_t*>(page.data_ptr()), page.stride(0) * size, page.stride(1) * size,
              int(block_size), int(head_size), int(page.size(1)), v_offset, hi_offset, lo_offset,
              scale_offset, Element(element), float(k_scale), float(v_scale)};
}

void append_op(TensorView key, TensorView value, TensorView slots, Optional<TensorView> key_mean,
               double threshold, bool relative,
               TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset, int64_t hi_offset,
               int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale, double v_scale) {
  AppendParams p{};
  p.page = page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element,
                   k_scale, v_scale);
  p.coding = Coding{float(threshold), relative};
  expect(slots.ndim() == 1 && is_int(slots, 64) && slots.stride(0) == 1, "slot_mapping: expected int64 [T]");
  p.num_tokens = slots.size(0);
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  for (int64_t i = 0; i < p.num_tokens; ++i)
    expect(p.slots[i] < page.size(0) * block_size, "slot_mapping: a slot lies behind the last block");
  const int heads = p.page.num_kv_heads;
  p.key = rows_of(key, p.num_tokens, heads, head_size, "key: expected float32, float16 or bfloat16 [T, Hkv, D] with a contiguous D");
  p.value = rows_of(value, p.num_tokens, heads, head_size, "value: expected float32, float16 or bfloat16 [T, Hkv, D] with a contiguous D");
  if (key_mean.has_value()) {
    const TensorView& mean = key_mean.value();
    expect(mean.ndim() == 2 && mean.dtype().code == kDLFloat && mean.dtype().bits == 32 && mean.size(0) == heads &&
               mean.size(1) == head_size && mean.stride(0) == head_size && mean.stride(1) == 1,
           "key_mean: expected contiguous float32 [Hkv, D]");
    p.key_mean = static_cast<const float*>(mean.data_ptr());
  }
  append(*active, p);
}

struct DecodeArgs {
  DecodeParams p{};

  DecodeArgs(TensorView block_table, TensorView seq_lens, const Page& page, int64_t num_blocks) {
    p.seq_lens = row_numbers(seq_lens, "seq_lens: expected int32 [R]");
    p.num_rows = int(seq_lens.size(0));
    expect(block_table.ndim() == 2 && is_int(block_table, 32) && block_table.stride(1) == 1 &&
               block_table.size(0) == p.num_rows,
           "block_table: expected int32 [R, blocks] with contiguous rows");
    p.page = page;
    p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
    p.blocks_per_row = block_table.stride(0);
    for (int row = 0; row < p.num_rows; ++row) {
      const int64_t length = p.seq_lens[row], used = (length + page.block_size - 1) / page.block_size;
      expect(length >= 0, "seq_lens: a context has a negative length");
      expect(used <= block_table.size(1), "block_table: has fewer blocks than a context needs");
      const int32_t* blocks = p.block_table + row * p.blocks_per_row;
      for (int64_t i = 0; i < used; ++i)
        expect(blocks[i] >= 0 && blocks[i] < num_blocks, "block_table: a block does not exist");
    }
  }

  void query(const TensorView& query) {
    expect(query.ndim() == 3 && query.size(1) % p.page.num_kv_heads == 0,
           "query: expected [R, Hq, D] with Hq a multiple of Hkv");
    p.num_query_heads = int(query.size(1));
    p.query = rows_of(query, p.num_rows, p.num_query_heads, p.page.head_size,
                      "query: expected float32, float16 or bfloat16 [R, Hq, D] with a contiguous D");
  }

  void budgets(const TensorView& budgets) {
    p.budgets = row_numbers(budgets, "budgets: expected int32 [R]", p.num_rows);
  }
};

void check_scores(const TensorView& scores, const DecodeParams& p) {
  const char* constraint = "scores: expected float32 [R, heads, L] with L no shorter than a context";
  expect(scores.ndim() == 3 && scores.dtype().code == kDLFloat && scores.dtype().bits == 32 &&
             scores.stride(2) == 1 && scores.size(0) == p.num_rows,
         constraint);
  for (int row = 0; row < p.num_rows; ++row)
    expect(p.seq_lens[row] >= 0 && p.seq_lens[row] <= scores.size(2), constraint);
}

void decode_op(TensorView query, TensorView output, TensorView block_table, TensorView seq_lens,
               TensorView budgets, TensorView stats, double softmax_scale, bool dot, bool per_query_head,
               int64_t num_sink_tokens, int64_t recent_window, int64_t sliding_window, double threshold,
               bool relative, TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset,
               int64_t hi_offset, int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale,
               double v_scale) {
  DecodeArgs args(block_table, seq_lens,
                  page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element,
                          k_scale, v_scale),
                  page.size(0));
  DecodeParams& p = args.p;
  p.coding = Coding{float(threshold), relative};
  args.query(query);
  args.budgets(budgets);
  p.output = rows_of(output, p.num_rows, p.num_query_heads, head_size,
                     "output: expected float32, float16 or bfloat16 [R, Hq, D] with a contiguous D");
  expect(stats.ndim() == 1 && is_int(stats, 64) && stats.size(0) == 4, "stats: expected int64 [4]");
  p.softmax_scale = float(softmax_scale);
  p.dot = dot;
  p.per_query_head = per_query_head;
  p.num_sink_tokens = int(num_sink_tokens);
  p.recent_window = int(recent_window);
  p.sliding_window = int(sliding_window);
  p.stats = static_cast<int64_t*>(stats.data_ptr());
  decode(*active, p);
}

void scan_op(TensorView query, TensorView block_table, TensorView seq_lens, TensorView scores, bool dot,
             bool per_query_head, double threshold, bool relative, TensorView page, int64_t block_size,
             int64_t head_size, int64_t v_offset, int64_t hi_offset, int64_t lo_offset, int64_t scale_offset,
             int64_t element, double k_scale, double v_scale) {
  DecodeArgs args(block_table, seq_lens,
                  page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element,
                          k_scale, v_scale),
                  page.size(0));
  DecodeParams& p = args.p;
  p.coding = Coding{float(threshold), relative};
  args.query(query);
  p.dot = dot;
  p.per_query_head = per_query_head;
  check_scores(scores, p);
  expect(scores.size(1) == (per_query_head ? p.num_query_heads : p.page.num_kv_heads),
         "scores: expected as many score heads as the query has token sets");
  scan(*active, p, static_cast<float*>(scores.data_ptr()), scores.stride(0), scores.stride(1));
}

void select_op(TensorView scores, TensorView seq_lens, TensorView budgets, TensorView tokens,
               int64_t num_sink_tokens, int64_t recent_window) {
  DecodeParams p{};
  p.seq_lens = row_numbers(seq_lens, "seq_lens: expected int32 [R]");
  p.num_rows = int(seq_lens.size(0));
  p.budgets = row_numbers(budgets, "budgets: expected int32 [R]", p.num_rows);
  p.num_sink_tokens = int(num_sink_tokens);
  p.recent_window = int(recent_window);
  check_scores(scores, p);
  bool fits = tokens.ndim() == 3 && is_int(tokens, 32) && tokens.stride(2) == 1 && tokens.size(0) == p.num_rows &&
              tokens.size(1) == scores.size(1);
  for (int row = 0; row < p.num_rows; ++row)
    fits = fits && std::min(p.seq_lens[row], p.budget(row)) <= tokens.size(2);
  expect(fits, "tokens: expected int32 [R, heads, tokens] with room for what is selected");
  p.num_query_heads = int(scores.size(1));
  p.per_query_head = true;
  select(*active, p, static_cast<const float*>(scores.data_ptr()), scores.stride(0), scores.stride(1),
         static_cast<int32_t*>(tokens.data_ptr()), tokens.stride(0), tokens.stride(1));
}

void gather_op(TensorView key, TensorView value, TensorView block_table, TensorView seq_lens,
               TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset, int64_t hi_offset,
               int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale, double v_scale) {
  DecodeArgs args(block_table, seq_lens,
                  page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element,
                          k_scale, v_scale),
                  page.size(0));
  const int heads = args.p.page.num_kv_heads;
  int64_t tokens = 0;
  for (int row = 0; row < args.p.num_rows; ++row) tokens += args.p.seq_lens[row];
  const DLDataType kind = key.dtype(), other = value.dtype();
  expect(kind.code == other.code && kind.bits == other.bits, "value: expected the dtype of key");
  gather(*active, args.p, rows_of(key, tokens, heads, head_size, "key: expected float32, float16 or bfloat16 [tokens, Hkv, D] with a contiguous D"),
         rows_of(value, tokens, heads, head_size, "value: expected float32, float16 or bfloat16 [tokens, Hkv, D] with a contiguous D"));
}

bool advise_huge_op(TensorView bytes) { return advise_huge(bytes.data_ptr(), bytes.size(0)); }

}  // namespace
}  // namespace adamas

TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_isa, adamas::use_isa)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, adamas::append_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, adamas::decode_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, adamas::scan_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select, adamas::select_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, adamas::gather_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(advise_huge, adamas::advise_huge_op)
