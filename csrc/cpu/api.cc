// The functions that Python calls (backends/cpu/backend.py). They check their arguments, at a cost of nanoseconds.
// tvm-ffi passes tensors by DLPack, so one library serves every CPython and PyTorch.
#include <algorithm>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

#include "common/arguments.h"
#include "cpu/kernels.h"

namespace adamas {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Map;
using tvm::ffi::Object;
using tvm::ffi::ObjectPtr;
using tvm::ffi::ObjectRef;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;

const Kernels* active = find_kernels("auto");

String use_isa(String name) {
  const Kernels* found = find_kernels(name.c_str());
  if (!found) TVM_FFI_THROW(ValueError) << "this processor cannot run the kernels called " << name.c_str();
  active = found;
  return String(active->name);
}

bool is_int(const TensorView& t, int bits) { return is_dtype(t, kDLInt, bits); }

Element element_of(const TensorView& t, const char* constraint) {
  const DLDataType type = t.dtype();
  if (type.code == kDLFloat && type.bits == 32) return Element::f32;
  if (type.code == kDLFloat && type.bits == 16) return Element::f16;
  expect(type.code == kDLBfloat, constraint);
  return Element::bf16;
}

// int32 [rows]; a negative `rows` accepts any number
const int32_t* row_numbers(const TensorView& t, const char* constraint, int64_t rows = -1) {
  expect(t.ndim() == 1 && is_int(t, 32) && t.stride(0) == 1 && (rows < 0 || t.size(0) == rows), constraint);
  return data<const int32_t>(t);
}

// [tokens, heads, head_size]
Rows rows_of(const TensorView& t, int64_t tokens, int64_t heads, int64_t head_size, const char* constraint) {
  expect(t.ndim() == 3 && t.size(0) >= tokens && t.size(1) == heads && t.size(2) == head_size &&
             t.stride(2) == 1,
         constraint);
  return Rows{t.data_ptr(), t.stride(0), t.stride(1), element_of(t, constraint)};
}

// An entry of a layer's description (backends/base.py, Params.native).
template <class T>
T number_of(const Map<String, Any>& description, const char* name) {
  return description.at(String(name)).cast<T>();
}

// kv_cache: [num_blocks, num_kv_heads, block_size, C]; each (block, head) is one dense run.
Page page_of(const TensorView& kv_cache, const Map<String, Any>& description) {
  auto integer = [&](const char* name) { return number_of<int64_t>(description, name); };
  const int64_t size = kv_cache.dtype().bits / 8, block_size = integer("block_size");
  Page page{};
  page.v_offset = integer("v_offset");
  page.hi_offset = integer("hi_offset");
  page.lo_offset = integer("lo_offset");
  page.scale_offset = integer("scale_offset");
  page.element = Element(integer("element"));
  page.k_scale = float(number_of<double>(description, "k_scale"));
  page.v_scale = float(number_of<double>(description, "v_scale"));
  page.block_size = int(block_size);
  page.head_size = int(integer("head_size"));
  page.num_kv_heads = int(integer("num_kv_heads"));
  const Argument pages{"kv_cache", "[blocks, Hkv, N, C] with N and C of the layout, and dense in both", kv_cache,
                       kv_cache.device()};
  expect_pages(pages, page, page.num_kv_heads, block_size);
  expect(block_size * kv_cache.size(3) * size < int64_t(1) << 31,
         "kv_cache: a block of one KV head spans 2 GiB or more");
  page.base = data<uint8_t>(kv_cache);
  page.block_stride = kv_cache.stride(0) * size;
  page.head_stride = kv_cache.stride(1) * size;
  return page;
}

// One attention layer. It points to its pages but does not keep them alive.
struct LayerObj : public Object {
  Page page;
  int64_t num_blocks;
  Coding coding;
  int num_query_heads, num_sink_tokens, recent_window, sliding_window;
  float softmax_scale, logit_scale, soft_cap;
  bool dot, per_query_head, maximum;
  Optional<Tensor> key_mean, sinks;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vllm_adamas.cpu.Layer", LayerObj, Object);
};

struct Layer : public ObjectRef {
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layer, ObjectRef, LayerObj);
  explicit Layer(ObjectPtr<LayerObj> layer) : ObjectRef(std::move(layer)) {}
};

// An optional tensor of the layer in contiguous float32.
const float* floats(const Optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t.value().data_ptr()) : nullptr;
}

bool is_floats(const Tensor& t, std::initializer_list<int64_t> shape) {
  return t.dtype().code == kDLFloat && t.dtype().bits == 32 && t.IsContiguous() &&
         std::ranges::equal(t.shape(), shape);
}

Layer bind(TensorView kv_cache, Map<String, Any> description, Optional<Tensor> key_mean, Optional<Tensor> sinks) {
  auto layer = tvm::ffi::make_object<LayerObj>();
  auto integer = [&](const char* name) { return int(number_of<int64_t>(description, name)); };
  auto flag = [&](const char* name) { return number_of<bool>(description, name); };
  layer->page = page_of(kv_cache, description);
  layer->num_blocks = kv_cache.size(0);
  layer->coding = Coding{float(number_of<double>(description, "threshold")), flag("relative")};
  layer->num_query_heads = integer("num_query_heads");
  layer->num_sink_tokens = integer("num_sink_tokens");
  layer->recent_window = integer("recent_window");
  layer->sliding_window = integer("sliding_window");
  layer->softmax_scale = float(number_of<double>(description, "softmax_scale"));
  layer->logit_scale = float(number_of<double>(description, "logit_scale"));
  layer->soft_cap = float(number_of<double>(description, "logits_soft_cap"));
  layer->dot = flag("dot");
  layer->per_query_head = flag("per_query_head");
  layer->maximum = flag("maximum");
  const Page& page = layer->page;
  expect(!key_mean.has_value() || is_floats(key_mean.value(), {page.num_kv_heads, coded_size(page.head_size)}),
         "key_mean: expected contiguous float32 [Hkv, S], S the dimensions of a signature");
  expect(!sinks.has_value() || is_floats(sinks.value(), {layer->num_query_heads}),
         "sinks: expected contiguous float32 [Hq]");
  layer->key_mean = key_mean;
  layer->sinks = sinks;
  return Layer(std::move(layer));
}

void append_op(Layer layer, TensorView key, TensorView value, TensorView slots) {
  AppendParams p{};
  p.page = layer->page;
  p.coding = layer->coding;
  expect(slots.ndim() == 1 && is_int(slots, 64) && slots.stride(0) == 1, "slot_mapping: expected int64 [T]");
  p.num_tokens = slots.size(0);
  p.slots = data<const int64_t>(slots);
  for (int64_t i = 0; i < p.num_tokens; ++i)
    expect(p.slots[i] < layer->num_blocks * p.page.block_size, "slot_mapping: a slot lies behind the last block");
  const int heads = p.page.num_kv_heads, head_size = p.page.head_size;
  p.key = rows_of(key, p.num_tokens, heads, head_size, "key: expected float32, float16 or bfloat16 [T, Hkv, D] with a contiguous D");
  p.value = rows_of(value, p.num_tokens, heads, head_size, "value: expected float32, float16 or bfloat16 [T, Hkv, D] with a contiguous D");
  p.key_mean = floats(layer->key_mean);
  append(*active, p);
}

struct DecodeArgs {
  DecodeParams p{};

  DecodeArgs(const Layer& layer, const TensorView& block_table, const TensorView& seq_lens) {
    const Page& page = p.page = layer->page;
    p.coding = layer->coding;
    p.num_query_heads = layer->num_query_heads;
    p.softmax_scale = layer->softmax_scale;
    p.logit_scale = layer->logit_scale;
    p.soft_cap = layer->soft_cap;
    p.sinks = floats(layer->sinks);
    p.dot = layer->dot;
    p.per_query_head = layer->per_query_head;
    p.maximum = layer->maximum;
    p.num_sink_tokens = layer->num_sink_tokens;
    p.recent_window = layer->recent_window;
    p.sliding_window = layer->sliding_window;
    p.seq_lens = row_numbers(seq_lens, "seq_lens: expected int32 [R]");
    p.num_rows = int(seq_lens.size(0));
    expect(block_table.ndim() == 2 && is_int(block_table, 32) && block_table.stride(1) == 1 &&
               block_table.size(0) == p.num_rows,
           "block_table: expected int32 [R, blocks] with contiguous rows");
    p.block_table = data<const int32_t>(block_table);
    p.blocks_per_row = block_table.stride(0);
    for (int row = 0; row < p.num_rows; ++row) {
      const int64_t length = p.seq_lens[row], used = (length + page.block_size - 1) / page.block_size;
      expect(length >= 0, "seq_lens: a context has a negative length");
      expect(used <= block_table.size(1), "block_table: has fewer blocks than a context needs");
      const int32_t* blocks = p.block_table + row * p.blocks_per_row;
      for (int64_t i = 0; i < used; ++i)
        expect(blocks[i] >= 0 && blocks[i] < layer->num_blocks, "block_table: a block does not exist");
    }
  }

  void query(const TensorView& query) {
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

void decode_op(Layer layer, TensorView query, TensorView block_table, TensorView seq_lens, TensorView budgets,
               TensorView output, TensorView stats, Optional<Tensor> lse) {
  DecodeArgs args(layer, block_table, seq_lens);
  DecodeParams& p = args.p;
  args.query(query);
  args.budgets(budgets);
  p.output = rows_of(output, p.num_rows, p.num_query_heads, p.page.head_size,
                     "output: expected float32, float16 or bfloat16 [R, Hq, D] with a contiguous D");
  expect(stats.ndim() == 1 && is_int(stats, 64) && stats.size(0) == 5, "stats: expected int64 [5]");
  p.stats = data<int64_t>(stats);
  expect(!lse.has_value() || is_floats(lse.value(), {p.num_rows, p.num_query_heads}),
         "lse: expected contiguous float32 [R, Hq]");
  p.lse = lse.has_value() ? static_cast<float*>(lse.value().data_ptr()) : nullptr;
  decode(*active, p);
}

void scan_op(Layer layer, TensorView query, TensorView block_table, TensorView seq_lens, TensorView scores) {
  DecodeArgs args(layer, block_table, seq_lens);
  args.query(query);
  check_scores(scores, args.p);
  expect(scores.size(1) == args.p.score_heads(), "scores: expected as many score heads as the query has token sets");
  scan(*active, args.p, data<float>(scores), scores.stride(0), scores.stride(1));
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
  select(*active, p, data<const float>(scores), scores.stride(0), scores.stride(1),
         data<int32_t>(tokens), tokens.stride(0), tokens.stride(1));
}

void gather_op(Layer layer, TensorView block_table, TensorView seq_lens, TensorView key, TensorView value) {
  DecodeArgs args(layer, block_table, seq_lens);
  const int heads = args.p.page.num_kv_heads, head_size = args.p.page.head_size;
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, adamas::bind)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, adamas::append_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, adamas::decode_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, adamas::scan_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select, adamas::select_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, adamas::gather_op)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(advise_huge, adamas::advise_huge_op)
