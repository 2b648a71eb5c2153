// A layer as it is bound: what its kernels are told, but for what changes from step to step.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>

#include "sm90/params.h"

namespace adamas {

// It keeps the address of the KV cache, not the tensor.
class LayerObj : public tvm::ffi::Object {
 public:
  DLDevice device;    // of the KV cache, and of every argument
  int64_t num_slots;  // tokens that the KV cache holds
  AppendParams append{};
  DecodeParams decode{};
  tvm::ffi::Optional<tvm::ffi::Tensor> key_mean;  // what append.key_mean points into

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("adamas.cuda.Layer", LayerObj, tvm::ffi::Object);
};

class Layer : public tvm::ffi::ObjectRef {
 public:
  explicit Layer(tvm::ffi::ObjectPtr<LayerObj> layer) : ObjectRef(std::move(layer)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layer, tvm::ffi::ObjectRef, LayerObj);
};

// What the heads and the score decide.
DecodeParams decode_shape(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot,
                          bool per_query_head);

// kv_cache: [num_blocks, num_kv_heads, block_size, C]; the numbers from block_size to v_scale are those of its
// layout (Params.numbers). key_mean: float32 [num_kv_heads, head_size].
Layer bind(tvm::ffi::TensorView kv_cache, int64_t block_size, int64_t head_size, int64_t v_offset, int64_t hi_offset,
           int64_t lo_offset, int64_t scale_offset, int64_t element, double k_scale, double v_scale,
           tvm::ffi::Optional<tvm::ffi::Tensor> key_mean, int64_t num_query_heads, int64_t num_kv_heads, bool dot,
           bool per_query_head, double threshold, bool relative, double softmax_scale, int64_t num_sink_tokens,
           int64_t recent_window, int64_t sliding_window);

}  // namespace adamas
