// The functions that Python calls. They check their arguments, so that no kernel exceeds its limits.
// tvm-ffi passes tensors by DLPack, so one library serves every CPython and PyTorch.
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdint>

#include "common/arguments.h"
#include "sm90/layer.h"
#include "sm90/sample.h"

namespace adamas {
namespace {

using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;

constexpr char kKeyOrValue[] = "[T, Hkv, D] of the pages' dtype (bfloat16 or float16 for fp8 pages), D contiguous";
constexpr char kQuery[] = "[R, Hq, D] of the pages' dtype (bfloat16 or float16 for fp8 pages), D contiguous";

// The stream that the operation runs on. Callers check everything else first, since those checks need no GPU.
void* current_stream(const Layer& layer) {
  expect(layer->device.device_type == kDLCUDA, "kv_cache: expected a layer that is bound on a CUDA device");
  return TVMFFIEnvGetStream(layer->device.device_type, layer->device.device_id);
}

// A contiguous vector of `size` integers; a negative size accepts any length.
template <class T>
T* as_vector(const TensorView& t, const char* name, const char* wanted, DLDevice device, int64_t size = -1) {
  const Argument argument{name, wanted, t, device};
  argument.expect_device();
  argument.expect(is_dtype(t, kDLInt, int(sizeof(T)) * 8));
  argument.expect_shape({size});
  return data<T>(t);
}

const int32_t* as_block_table(const TensorView& t, int64_t rows, DLDevice device) {
  const Argument argument{"block_table", "int32 [R, blocks] with contiguous rows", t, device};
  argument.expect_device();
  argument.expect(is_dtype(t, kDLInt, 32));
  argument.expect_shape({rows, -1});
  return data<const int32_t>(t);
}

// [tokens, heads, head_size] with at least `tokens` tokens, of the dtype that the pages require.
Rows as_rows(const TensorView& t, const char* name, const char* wanted, const Layer& layer, int64_t tokens,
             int64_t heads) {
  const Page& page = layer->append.page;
  const Argument argument{name, wanted, t, layer->device};
  argument.expect_device();
  const Element element = is_element(t, Element::f16) ? Element::f16 : Element::bf16;
  argument.expect(is_element(t, page.fp8() ? element : page.element));
  argument.expect_shape({-1, heads, page.head_size});
  argument.expect(t.size(0) >= tokens);
  return Rows{t.data_ptr(), t.stride(0), t.stride(1), element};
}

void expect_same_type(const TensorView& t, const char* name, const char* wanted, const TensorView& other) {
  if (t.dtype() != other.dtype()) Argument{name, wanted, t, other.device()}.fail();
}

void append_op(Layer layer, TensorView key, TensorView value, TensorView slot_mapping) {
  AppendParams p = layer->append;
  p.slots = as_vector<const int64_t>(slot_mapping, "slot_mapping", "contiguous int64 [T]", layer->device);
  p.num_tokens = slot_mapping.size(0);
  const int heads = p.page.num_kv_heads;
  p.key = as_rows(key, "key", kKeyOrValue, layer, p.num_tokens, heads);
  p.value = as_rows(value, "value", kKeyOrValue, layer, p.num_tokens, heads);
  expect_same_type(value, "value", "the dtype of key", key);
  append(p, current_stream(layer));
}

void gather_op(Layer layer, TensorView block_table, TensorView seq_lens, TensorView key, TensorView value) {
  GatherParams p{};
  p.page = layer->append.page;
  p.seq_lens = as_vector<const int32_t>(seq_lens, "seq_lens", "contiguous int32 [R]", layer->device);
  p.num_rows = int(seq_lens.size(0));
  p.block_table = as_block_table(block_table, p.num_rows, layer->device);
  p.blocks_per_row = block_table.stride(0);
  const int heads = p.page.num_kv_heads;
  p.num_tokens = key.ndim() ? key.size(0) : 0;
  p.key = as_rows(key, "key", kKeyOrValue, layer, 0, heads);
  p.value = as_rows(value, "value", "[T, Hkv, D] like key, D contiguous", layer, p.num_tokens, heads);
  expect_same_type(value, "value", "the dtype of key", key);
  const Argument outputs[] = {{"key", "", key, layer->device}, {"value", "", value, layer->device}};
  for (const Argument& output : outputs) output.expect_aligned(4);
  // Clamped to 32 bits: more vectors in a row would not fit a device.
  p.max_seq_len = int(std::min({block_table.size(1) * p.page.block_size, p.num_tokens, int64_t(INT32_MAX)}));
  gather(p, current_stream(layer));
}

// The parameters common to scan and decode: the rows of a step.
DecodeParams make_step(const Layer& layer, const TensorView& query, const TensorView& block_table,
                     const TensorView& seq_lens, int64_t max_seq_len, int64_t sample_bits, int64_t capacity) {
  DecodeParams p = layer->decode;
  p.seq_lens = as_vector<const int32_t>(seq_lens, "seq_lens", "contiguous int32 [R]", layer->device);
  const int64_t rows = seq_lens.size(0);
  p.block_table = as_block_table(block_table, rows, layer->device);
  p.blocks_per_row = block_table.stride(0);
  p.query = as_rows(query, "query", kQuery, layer, rows, p.num_query_heads);
  Argument{"query", "", query, layer->device}.expect_aligned(16);
  const int64_t longest = std::min(max_seq_len, block_table.size(1) * p.page.block_size);
  expect(rows <= kMaxRows, "seq_lens: more rows than the kernels hold");
  expect(longest >= 0 && longest <= kMaxContext, "max_seq_len: longer than the contexts that the kernels hold");
  expect(rows * p.page.num_kv_heads * longest <= kMaxStep,
         "max_seq_len: the step has more tokens than the kernels count");
  p.num_rows = int(rows);
  p.max_seq_len = int(longest);
  p.sample_bits = int(sample_bits);
  p.capacity = int(capacity);
  return p;
}

void use_workspace(DecodeParams& p, const TensorView& work, DLDevice device) {
  const Argument argument{"work", "contiguous uint8 [bytes], as many as workspace_bytes says", work, device};
  argument.expect_device();
  argument.expect(is_dtype(work, kDLUInt, 8));
  argument.expect_shape({-1});
  argument.expect(workspace(p, data<uint8_t>(work)) <= work.size(0));
}

// cluster, warps: blocks per (row, KV head) of the fused kernel and warps of a block; no blocks for the three kernels.
// positions: int32 [R] to scan the rows of a request together, see DecodeParams; none scans each alone.
// stages: which of the three run, bit 0 encode, bit 1 scan, bit 2 attend; the benchmark times them one by one.
void decode_op(Layer layer, TensorView query, TensorView output, TensorView block_table, TensorView seq_lens,
               TensorView budgets, Optional<Tensor> positions, TensorView stats, Optional<Tensor> lse, TensorView work,
               int64_t max_seq_len, int64_t cluster, int64_t warps, int64_t sample_bits, int64_t capacity, bool overlap,
               int64_t stages) {
  const DLDevice device = layer->device;
  DecodeParams p = make_step(layer, query, block_table, seq_lens, max_seq_len, sample_bits, capacity);
  p.output = as_rows(output, "output", "[R, Hq, D] of the dtype of query, D contiguous", layer, p.num_rows,
                     p.num_query_heads);
  expect_same_type(output, "output", "the dtype of query", query);
  Argument{"output", "", output, device}.expect_aligned(16);
  p.budgets = as_vector<const int32_t>(budgets, "budgets", "contiguous int32 [R]", device, p.num_rows);
  if (positions.has_value()) {
    const Tensor tensor = positions.value();
    p.positions = as_vector<const int32_t>(TensorView(tensor), "positions", "contiguous int32 [R]", device, p.num_rows);
    expect(cluster == 0 && scan_shares(p), "positions: the rows of a request are not scanned together in this step");
  }
  p.stats = as_vector<int64_t>(stats, "stats", "contiguous int64 [5]", device, 5);
  if (lse.has_value()) {
    const Tensor tensor = lse.value();
    const TensorView view(tensor);
    const Argument logs{"lse", "contiguous float32 [R, Hq]", view, device};
    logs.expect_device();
    logs.expect(is_dtype(view, kDLFloat, 32));
    logs.expect_shape({p.num_rows, p.num_query_heads});
    p.lse = data<float>(view);
  }
  p.overlap = overlap;
  void* stream = current_stream(layer);
  use_workspace(p, work, device);
  expect(cluster == 0 || fused_fits(p, int(cluster), int(warps)),
         "cluster: the fused kernel does not take this step in so many blocks");
  if (p.num_rows == 0) return;
  if (cluster) return fused(p, int(cluster), int(warps), stream);
  if (stages & 1) encode(p, stream);
  if (stages & 2) scan(p, stream);
  if (stages & 4) attend(p, stream);
}

// Scores of all tokens; no token is forced.
void scan_op(Layer layer, TensorView query, TensorView block_table, TensorView seq_lens, TensorView scores,
             TensorView work) {
  const Argument argument{"scores", "float32 [R, score heads, L], L contiguous", scores, layer->device};
  const int64_t longest = scores.ndim() == 3 ? scores.size(2) : 0;
  DecodeParams p = make_step(layer, query, block_table, seq_lens, longest, 0, 0);
  argument.expect_device();
  argument.expect(is_dtype(scores, kDLFloat, 32));
  argument.expect_shape({p.num_rows, p.score_heads_per_kv * p.page.num_kv_heads, -1});
  p.scores = data<float>(scores);
  p.scores_row_stride = scores.stride(0);
  p.scores_head_stride = scores.stride(1);
  p.num_sink_tokens = p.recent_window = p.sliding_window = p.least_budget = 0;
  void* stream = current_stream(layer);
  use_workspace(p, work, layer->device);
  if (p.num_rows == 0) return;
  encode(p, stream);
  scan(p, stream);
}

int64_t workspace_bytes_op(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot,
                           bool per_query_head, bool maximum, int64_t rows, int64_t capacity) {
  DecodeParams p = decode_shape(num_query_heads, num_kv_heads, head_size, dot, per_query_head, maximum);
  p.num_rows = int(rows);
  p.capacity = int(capacity);
  return workspace(p, nullptr);
}

bool scan_shares_op(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot, bool per_query_head,
                    bool maximum) {
  return scan_shares(decode_shape(num_query_heads, num_kv_heads, head_size, dot, per_query_head, maximum));
}

int64_t max_sample_bits_op(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot,
                           bool per_query_head, bool maximum) {
  return max_sample_bits(decode_shape(num_query_heads, num_kv_heads, head_size, dot, per_query_head, maximum));
}

// Clusters of the fused kernel that run at once, 0 if it does not support the shape. half: queries are float16.
int64_t fused_clusters_op(Layer layer, bool half, int64_t max_seq_len, int64_t cluster, int64_t warps) {
  DecodeParams p = layer->decode;
  p.query.element = half ? Element::f16 : Element::bf16;
  p.max_seq_len = int(max_seq_len);
  return fused_clusters(p, int(cluster), int(warps));
}

int64_t sample_bits_op(int64_t length, int64_t most) { return sample_bits(int(length), int(most)); }

// The highest rank that encode aims at in its sample.
int64_t most_sample_rank_op(int64_t need, int64_t sample, int64_t length) {
  return sample_rank(int(need), int(sample), int(length), kMostSpread);
}

Map<String, int64_t> limits_op() {
  return {{"max_context", kMaxContext}, {"max_block", kMaxBlock}, {"max_rows", kMaxRows},
          {"max_step", kMaxStep},       {"max_group", kMaxGroup}, {"max_cluster", kMaxCluster},
          {"most_wanted", kMostWanted}, {"max_groups", kTickets}};
}

}  // namespace
}  // namespace adamas

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, adamas::bind)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, adamas::append_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, adamas::decode_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, adamas::scan_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, adamas::gather_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_bytes, adamas::workspace_bytes_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan_shares, adamas::scan_shares_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_bits, adamas::sample_bits_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(max_sample_bits, adamas::max_sample_bits_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_clusters, adamas::fused_clusters_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(most_sample_rank, adamas::most_sample_rank_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(limits, adamas::limits_op)
