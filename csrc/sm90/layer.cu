// bind: turns Python's description of a layer into the parameters of its kernels.
#include "sm90/layer.h"

#include <algorithm>
#include <cmath>

#include "common/arguments.h"

namespace adamas {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;

Page make_page(const TensorView& kv_cache, const PageLayout& layout, int64_t head_size) {
  Page page{};
  static_cast<PageLayout&>(page) = layout;
  const int64_t size = kv_cache.dtype().bits / 8, block_size = kv_cache.size(2), content = kv_cache.size(3);
  page.base = data<uint8_t>(kv_cache);
  page.num_kv_heads = int(kv_cache.size(1));
  // The stride of a single head or block is arbitrary, so it is not used.
  page.head_stride = page.num_kv_heads > 1 ? kv_cache.stride(1) * size : block_size * content * size;
  const int64_t block_stride =
      kv_cache.size(0) > 1 ? kv_cache.stride(0) * size : page.num_kv_heads * page.head_stride;
  expect(uintptr_t(page.base) % 16 == 0 && block_stride % 16 == 0 && page.head_stride % 16 == 0,
         "kv_cache: blocks and heads must start at multiples of 16 bytes");
  expect(block_stride >= 0 && block_stride >> 31 == 0, "kv_cache: a block must span less than 2 GiB");
  page.block_stride = uint32_t(block_stride);
  page.block_size = int(block_size);
  const int64_t quads = block_size / kQuad;
  page.quad_magic = uint32_t(((int64_t(1) << 32) + quads - 1) / quads);
  page.head_size = int(head_size);
  page.words = int(head_size / kWord);
  return page;
}

}  // namespace

DecodeParams decode_shape(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot,
                          bool per_query_head, bool maximum) {
  expect(num_kv_heads > 0 && num_query_heads > 0 && num_query_heads % num_kv_heads == 0,
         "num_query_heads: expected a multiple of num_kv_heads");
  DecodeParams p{};
  p.num_query_heads = int(num_query_heads);
  p.group = int(num_query_heads / num_kv_heads);
  expect(p.group <= kMaxGroup, "num_query_heads: expected at most 16 per KV head");
  expect(!maximum || (dot && !per_query_head), "maximum: expected dot scores and one set of tokens per KV head");
  p.mode = maximum ? Mode::dot_max : dot ? Mode::dot : per_query_head ? Mode::manhattan : Mode::manhattan_sum;
  p.per_query_head = per_query_head;
  p.score_heads_per_kv = per_query_head ? p.group : 1;
  p.head_quads = p.mode == Mode::dot && !per_query_head ? 1 : (p.group + 3) / 4;
  p.page.head_size = int(head_size);
  p.page.words = int(head_size / kWord);
  p.page.num_kv_heads = int(num_kv_heads);
  p.norm = float(std::pow(double(head_size & -head_size), -0.5));
  return p;
}

Layer bind(TensorView kv_cache, Map<String, Any> description, Optional<Tensor> key_mean, Optional<Tensor> sinks) {
  auto number = [&](const char* name) { return description.at(String(name)).cast<double>(); };
  auto integer = [&](const char* name) { return description.at(String(name)).cast<int64_t>(); };
  auto flag = [&](const char* name) { return description.at(String(name)).cast<bool>(); };

  const int64_t head_size = integer("head_size"), block_size = integer("block_size");
  const int64_t num_kv_heads = integer("num_kv_heads");
  expect(head_size == 64 || head_size == 96 || head_size == 128 || head_size == 192 || head_size == 256,
         "head_size: expected 64, 96, 128, 192 or 256");
  expect(block_size >= kTile && block_size <= kMaxBlock && block_size % kTile == 0,
         "block_size: expected a multiple of 16 up to 65536");
  PageLayout layout{};
  layout.v_offset = integer("v_offset");
  layout.hi_offset = integer("hi_offset");
  layout.lo_offset = integer("lo_offset");
  layout.scale_offset = integer("scale_offset");
  layout.element = Element(integer("element"));
  layout.k_scale = float(number("k_scale"));
  layout.v_scale = float(number("v_scale"));
  expect(layout.element == Element::bf16 || layout.element == Element::f16 || layout.fp8(),
         "element: expected bfloat16, float16, e4m3 or e5m2 pages");
  const DLDevice device = kv_cache.device();
  const Argument pages{"kv_cache", "[blocks, Hkv, N, C] of the layout, dense in N and C", kv_cache, device};
  expect_pages(pages, layout, num_kv_heads, block_size);

  auto layer = tvm::ffi::make_object<LayerObj>();
  layer->device = device;
  DecodeParams& p = layer->decode;
  p = decode_shape(integer("num_query_heads"), num_kv_heads, head_size, flag("dot"), flag("per_query_head"),
                   flag("maximum"));
  p.page = make_page(kv_cache, layout, head_size);
  p.coding = Coding{float(number("threshold")), flag("relative")};
  p.softmax_scale = float(number("softmax_scale") * number("k_scale") * kLog2E);  // logits in base 2
  p.logit_scale = float(number("logit_scale"));
  p.soft_cap = float(number("logits_soft_cap") * kLog2E);
  p.num_sink_tokens = int(integer("num_sink_tokens"));
  p.recent_window = int(integer("recent_window"));
  p.least_budget = std::max(p.num_sink_tokens + p.recent_window, 1);
  p.sliding_window = int(integer("sliding_window"));

  AppendParams& a = layer->append;
  a.page = p.page;
  a.coding = p.coding;
  a.norm = p.norm;
  a.num_slots = kv_cache.size(0) * block_size;
  if (key_mean.has_value()) {
    const Tensor tensor = key_mean.value();
    const TensorView view(tensor);
    const Argument mean{"key_mean", "contiguous float32 [Hkv, D]", view, device};
    mean.expect_device();
    mean.expect(is_dtype(view, kDLFloat, 32));
    mean.expect_shape({num_kv_heads, head_size});
    mean.expect(view.size(0) == 1 || view.stride(0) == head_size);
    layer->key_mean = key_mean;
    a.key_mean = data<const float>(view);
  }
  if (sinks.has_value()) {
    const Tensor tensor = sinks.value();
    const TensorView view(tensor);
    const Argument logits{"sinks", "contiguous float32 [Hq]", view, device};
    logits.expect_device();
    logits.expect(is_dtype(view, kDLFloat, 32));
    logits.expect_shape({p.num_query_heads});
    layer->sinks = sinks;
    p.sinks = data<const float>(view);
  }
  return Layer(layer);
}

}  // namespace adamas
