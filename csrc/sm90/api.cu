// The functions that Python sees (backends/cuda/__init__.py checks shapes and fills the arguments).
// tvm-ffi passes tensors by DLPack, so one library serves every CPython and PyTorch.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "sm90/common.cuh"

namespace adamas {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

void* stream_of(const TensorView& t) { return TVMFFIEnvGetStream(t.device().device_type, t.device().device_id); }

Element element_of(const TensorView& t) {
  const DLDataType type = t.dtype();
  if (type.code == kDLFloat && type.bits == 16) return Element::f16;
  if (type.code == kDLBfloat) return Element::bf16;
  TVM_FFI_THROW(TypeError) << "expected a float16 or bfloat16 tensor";
}

Rows rows_of(const TensorView& t) {  // [tokens, heads, head_size], head_size contiguous
  return Rows{t.data_ptr(), t.stride(0), t.stride(1), element_of(t)};
}

// cache: [num_blocks, num_kv_heads, block_size, content], each (block, head) one run; offsets: V, hi, lo, scale.
Page page_of(const TensorView& cache, int64_t block_size, int64_t head_size, int64_t v_offset,
             int64_t hi_offset, int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale,
             double v_scale) {
  const int64_t size = cache.dtype().bits / 8, token_bytes = scale_offset / block_size + 2;
  const int64_t content = (token_bytes + size - 1) / size;
  if (cache.ndim() != 4 || cache.size(2) != block_size || cache.size(3) != content || cache.stride(2) != content ||
      cache.stride(3) != 1)
    TVM_FFI_THROW(ValueError) << "page: expected [blocks, Hkv, N, C] with N and C of the layout, and dense in both";
  Page page{};
  page.base = static_cast<uint8_t*>(cache.data_ptr());
  // The stride of a single head or block may be anything.
  page.head_stride = cache.size(1) > 1 ? cache.stride(1) * size : block_size * content * size;
  const int64_t block_stride = cache.size(0) > 1 ? cache.stride(0) * size : cache.size(1) * page.head_stride;
  if (uintptr_t(page.base) % 16 || block_stride % 16 || page.head_stride % 16)
    TVM_FFI_THROW(ValueError) << "page: blocks and heads must start at multiples of 16 bytes";
  if (block_stride >> 31) TVM_FFI_THROW(ValueError) << "page: a block of the KV cache spans 2 GiB or more";
  if (block_size < kTile || block_size > kMaxBlock) TVM_FFI_THROW(ValueError) << "page: a block has 16 to 65536 tokens";
  page.block_stride = uint32_t(block_stride);
  page.block_size = int(block_size);
  const int64_t quads = block_size / kQuad;
  page.quad_magic = uint32_t(((1ll << 32) + quads - 1) / quads);
  page.head_size = int(head_size);
  page.words = int(head_size / kWord);
  page.num_kv_heads = int(cache.size(1));
  page.v_offset = v_offset;
  page.hi_offset = hi_offset;
  page.lo_offset = lo_offset;
  page.scale_offset = scale_offset;
  page.element = Element(element);
  page.k_scale = float(k_scale);
  page.v_scale = float(v_scale);
  return page;
}

float hadamard_norm(int64_t head_size) { return float(std::pow(double(head_size & -head_size), -0.5)); }

template <class T>
T* pointer_of(const TensorView& t) {
  return static_cast<T*>(t.data_ptr());
}

void append_op(TensorView key, TensorView value, TensorView slots, Optional<TensorView> key_mean, double threshold,
               bool relative,
               TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset, int64_t hi_offset,
               int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale, double v_scale) {
  AppendParams p{};
  p.page = page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element, k_scale, v_scale);
  p.coding = Coding{float(threshold), relative};
  p.key = rows_of(key);
  p.value = rows_of(value);
  p.slots = pointer_of<const int64_t>(slots);
  p.num_tokens = slots.size(0);
  p.num_slots = page.size(0) * block_size;
  p.norm = hadamard_norm(head_size);
  if (key_mean.has_value()) p.key_mean = pointer_of<const float>(key_mean.value());
  append(p, stream_of(key));
}

void gather_op(TensorView key, TensorView value, TensorView block_table, TensorView seq_lens,
               TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset, int64_t hi_offset,
               int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale, double v_scale) {
  GatherParams p{};
  p.page = page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element, k_scale, v_scale);
  p.key = rows_of(key);
  p.value = rows_of(value);
  p.block_table = pointer_of<const int32_t>(block_table);
  p.blocks_per_row = block_table.stride(0);
  p.seq_lens = pointer_of<const int32_t>(seq_lens);
  p.num_rows = int(seq_lens.size(0));
  p.num_tokens = key.size(0);
  // So that a row's vectors are fewer than 2^31: more would not fit a device.
  p.max_seq_len = int(std::min({block_table.size(1) * block_size, p.num_tokens, int64_t(INT32_MAX)}));
  gather(p, stream_of(key));
}

// Sinks and recent window are kept whatever a row's budget is, and one token at least.
int least_budget(int64_t num_sink_tokens, int64_t recent_window) {
  return int(std::max(num_sink_tokens + recent_window, int64_t(1)));
}

// What the head counts and the score decide.
DecodeParams shape_of(int64_t num_rows, int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size,
                      bool dot, bool per_query_head, int64_t capacity) {
  DecodeParams p{};
  p.num_rows = int(num_rows);
  p.num_query_heads = int(num_query_heads);
  p.group = int(num_query_heads / num_kv_heads);
  p.mode = dot ? Mode::dot : per_query_head ? Mode::manhattan : Mode::manhattan_sum;
  p.per_query_head = per_query_head;
  p.score_heads_per_kv = per_query_head ? p.group : 1;
  p.head_quads = dot && !per_query_head ? 1 : (p.group + 3) / 4;
  p.capacity = int(capacity);
  p.page.head_size = int(head_size);
  p.page.words = int(head_size / kWord);
  p.page.num_kv_heads = int(num_kv_heads);
  p.norm = hadamard_norm(head_size);
  return p;
}

int64_t workspace_bytes_op(int64_t num_rows, int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size,
                           bool dot, bool per_query_head, int64_t capacity) {
  DecodeParams p = shape_of(num_rows, num_query_heads, num_kv_heads, head_size, dot, per_query_head, capacity);
  return workspace(p, nullptr);
}

DecodeParams decode_params(const TensorView& query, const TensorView& block_table, const TensorView& seq_lens,
                           const TensorView& work, int64_t max_seq_len, int64_t capacity, bool dot,
                           bool per_query_head, double threshold, bool relative, const Page& page) {
  DecodeParams p = shape_of(seq_lens.size(0), query.size(1), page.num_kv_heads, page.head_size, dot,
                            per_query_head, capacity);
  p.page = page;
  p.coding = Coding{float(threshold), relative};
  p.query = rows_of(query);
  p.block_table = pointer_of<const int32_t>(block_table);
  p.blocks_per_row = block_table.stride(0);
  p.seq_lens = pointer_of<const int32_t>(seq_lens);
  const int64_t longest = std::min(max_seq_len, block_table.size(1) * page.block_size);
  if (p.num_rows > kMaxRows || longest < 0 || longest > kMaxContext ||
      int64_t(p.num_rows) * page.num_kv_heads * longest > kMaxStep)
    TVM_FFI_THROW(ValueError) << "the step has more rows or longer contexts than the kernels hold";
  p.max_seq_len = int(longest);
  if (workspace(p, pointer_of<uint8_t>(work)) > work.size(0))
    TVM_FFI_THROW(ValueError) << "the workspace is too small";
  return p;
}

// cluster: blocks per (row, KV head) of the fused kernel, 0 for the three kernels; of those, stages: bit
// 0 encode, bit 1 scan, bit 2 attend (the benchmark times them one by one).
void decode_op(TensorView query, TensorView output, TensorView block_table, TensorView seq_lens,
               TensorView budgets, TensorView stats, TensorView work, int64_t max_seq_len, int64_t capacity,
               double softmax_scale, bool dot, bool per_query_head, int64_t num_sink_tokens,
               int64_t recent_window, int64_t sliding_window, double threshold, bool relative, int64_t stages,
               int64_t cluster, bool overlap, TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset,
               int64_t hi_offset, int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale,
               double v_scale) {
  DecodeParams p = decode_params(
      query, block_table, seq_lens, work, max_seq_len, capacity, dot, per_query_head, threshold, relative,
      page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element, k_scale, v_scale));
  p.output = rows_of(output);
  p.budgets = pointer_of<const int32_t>(budgets);
  p.softmax_scale = float(softmax_scale * k_scale * 1.4426950408889634);  // logits in base 2
  p.num_sink_tokens = int(num_sink_tokens);
  p.recent_window = int(recent_window);
  p.least_budget = least_budget(num_sink_tokens, recent_window);
  p.sliding_window = int(sliding_window);
  p.overlap = overlap;
  p.stats = pointer_of<int64_t>(stats);
  if (p.num_rows == 0) return;
  void* stream = stream_of(query);
  if (cluster) return fused(p, int(cluster), stream);
  if (stages & 1) encode(p, stream);
  if (stages & 2) scan(p, stream);
  if (stages & 4) attend(p, stream);
}

void scan_op(TensorView query, TensorView block_table, TensorView seq_lens, TensorView scores, TensorView work,
             bool dot, bool per_query_head, double threshold, bool relative, TensorView page, int64_t block_size,
             int64_t head_size, int64_t v_offset, int64_t hi_offset, int64_t lo_offset, int64_t scale_offset,
             int64_t element, double k_scale, double v_scale) {
  DecodeParams p = decode_params(
      query, block_table, seq_lens, work, scores.size(2), 1, dot, per_query_head, threshold, relative,
      page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element, k_scale, v_scale));
  p.scores = pointer_of<float>(scores);
  p.scores_row_stride = scores.stride(0);
  p.scores_head_stride = scores.stride(1);
  if (p.num_rows == 0) return;
  encode(p, stream_of(query));
  scan(p, stream_of(query));
}

// Clusters of the fused kernel that run at once, 0 if it does not take the shape.
int64_t fused_clusters_op(int64_t num_query_heads, int64_t max_seq_len, bool dot, bool per_query_head, bool half,
                          int64_t cluster, TensorView page, int64_t block_size, int64_t head_size, int64_t v_offset,
                          int64_t hi_offset, int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale,
                          double v_scale) {
  const Page pages =
      page_of(page, block_size, head_size, v_offset, hi_offset, lo_offset, scale_offset, element, k_scale, v_scale);
  DecodeParams p = shape_of(1, num_query_heads, pages.num_kv_heads, head_size, dot, per_query_head, 1);
  p.page = pages;
  p.query.element = half ? Element::f16 : Element::bf16;
  p.max_seq_len = int(max_seq_len);
  return fused_clusters(p, int(cluster));
}

void select_op(TensorView scores, TensorView seq_lens, TensorView budgets, TensorView tokens,
               int64_t num_sink_tokens, int64_t recent_window) {
  SelectParams p{};
  p.scores = pointer_of<const float>(scores);
  p.row_stride = scores.stride(0);
  p.head_stride = scores.stride(1);
  p.seq_lens = pointer_of<const int32_t>(seq_lens);
  p.budgets = pointer_of<const int32_t>(budgets);
  p.tokens = pointer_of<int32_t>(tokens);
  p.tokens_row_stride = tokens.stride(0);
  p.tokens_head_stride = tokens.stride(1);
  p.num_rows = int(scores.size(0));
  p.num_heads = int(scores.size(1));
  p.max_seq_len = int(scores.size(2));
  p.most = int(tokens.size(2));
  p.num_sink_tokens = int(num_sink_tokens);
  p.recent_window = int(recent_window);
  p.least_budget = least_budget(num_sink_tokens, recent_window);
  select(p, stream_of(scores));
}

}  // namespace
}  // namespace adamas

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, adamas::append_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, adamas::gather_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, adamas::scan_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select, adamas::select_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, adamas::decode_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_clusters, adamas::fused_clusters_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_bytes, adamas::workspace_bytes_op)
