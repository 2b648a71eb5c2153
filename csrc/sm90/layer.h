// A bound layer: the parameters of its kernels that do not change from step to step.
#pragma once
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include "sm90/params.h"

namespace adamas {

// It holds the address of the KV cache, not the tensor.
class LayerObj : public tvm::ffi::Object {
 public:
  DLDevice device;  // of the KV cache, and of every argument
  AppendParams append{};
  DecodeParams decode{};
  tvm::ffi::Optional<tvm::ffi::Tensor> key_mean, sinks;  // own what append.key_mean and decode.sinks point to

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vllm_adamas.cuda.Layer", LayerObj, tvm::ffi::Object);
};

class Layer : public tvm::ffi::ObjectRef {
 public:
  explicit Layer(tvm::ffi::ObjectPtr<LayerObj> layer) : ObjectRef(std::move(layer)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layer, tvm::ffi::ObjectRef, LayerObj);
};

// The parameters that depend on the heads and the score alone.
DecodeParams decode_shape(int64_t num_query_heads, int64_t num_kv_heads, int64_t head_size, bool dot,
                          bool per_query_head, bool maximum);

// kv_cache: [num_blocks, num_kv_heads, block_size, C]. description: Params.native in backends/base.py. key_mean:
// float32 [num_kv_heads, head_size]. sinks: float32 [num_query_heads].
Layer bind(tvm::ffi::TensorView kv_cache, tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> description,
           tvm::ffi::Optional<tvm::ffi::Tensor> key_mean, tvm::ffi::Optional<tvm::ffi::Tensor> sinks);

}  // namespace adamas
