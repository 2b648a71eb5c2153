// Checks of tensor arguments passed from Python. A failed check throws a ValueError of one sentence that names
// the argument, the constraint and the value given.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "common/page.h"

namespace adamas {

using tvm::ffi::TensorView;

inline void expect(bool holds, const char* constraint) {
  if (!holds) TVM_FFI_THROW(ValueError) << constraint;
}

inline std::string to_string(DLDevice device) {
  const char* kind = device.device_type == kDLCUDA ? "cuda" : device.device_type == kDLCPU ? "cpu" : "device";
  return std::string(kind) + ":" + std::to_string(device.device_id);
}

inline std::string to_string(DLDataType type) {
  const char* kind = type.code == kDLInt      ? "int"
                     : type.code == kDLUInt   ? "uint"
                     : type.code == kDLFloat  ? "float"
                     : type.code == kDLBfloat ? "bfloat"
                     : type.code == kDLBool   ? "bool"
                                              : "another type of ";
  return kind + std::to_string(type.bits);
}

inline bool is_dtype(const TensorView& t, DLDataTypeCode code, int bits) {
  return t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1;
}

inline bool is_element(const TensorView& t, Element element) {
  switch (element) {
    case Element::f32: return is_dtype(t, kDLFloat, 32);
    case Element::bf16: return is_dtype(t, kDLBfloat, 16);
    case Element::f16: return is_dtype(t, kDLFloat, 16);
    default: return is_dtype(t, kDLUInt, 8);  // fp8 is stored as bytes
  }
}

// A tensor argument with its name, the constraint in words and the required device.
struct Argument {
  const char* name;
  const char* wanted;
  const TensorView& tensor;
  DLDevice device;

  void expect(bool holds) const {
    if (!holds) fail();
  }

  void expect_device() const {
    const DLDevice found = tensor.device();
    if (found.device_type != device.device_type || found.device_id != device.device_id)
      TVM_FFI_THROW(ValueError) << name << ": expected a tensor on " << to_string(device) << ", got one on "
                                << to_string(found);
  }

  void fail() const {
    std::ostringstream text;
    text << name << ": expected " << wanted << ", got " << to_string(tensor.dtype());
    auto list = [&](auto number) {
      text << '[';
      for (int i = 0; i < tensor.ndim(); ++i) text << (i ? ", " : "") << number(i);
      text << ']';
    };
    text << ' ';
    list([&](int i) { return tensor.size(i); });
    text << " with strides ";
    list([&](int i) { return tensor.stride(i); });
    TVM_FFI_THROW(ValueError) << text.str();
  }

  // The sizes of all dimensions, -1 for any; the last dimension must be contiguous.
  void expect_shape(std::initializer_list<int64_t> sizes) const {
    bool fits = tensor.ndim() == int(sizes.size());
    int i = 0;
    for (int64_t size : sizes) {
      fits = fits && (size < 0 || tensor.size(i) == size);
      ++i;
    }
    expect(fits && (tensor.size(tensor.ndim() - 1) <= 1 || tensor.stride(tensor.ndim() - 1) == 1));
  }

  // Every row of the last dimension must start at a multiple of `bytes`.
  void expect_aligned(int64_t bytes) const {
    bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
    const int64_t size = tensor.dtype().bits / 8;
    for (int i = 0; i + 1 < tensor.ndim(); ++i)
      fits = fits && (tensor.size(i) <= 1 || tensor.stride(i) * size % bytes == 0);
    if (!fits) TVM_FFI_THROW(ValueError) << name << ": rows must start at multiples of " << bytes << " bytes";
  }
};

// kv_cache must be [num_blocks, num_kv_heads, block_size, C]; every page must be dense and have room for the planes.
inline void expect_pages(const Argument& kv_cache, const PageLayout& layout, int64_t num_kv_heads,
                         int64_t block_size) {
  const TensorView& t = kv_cache.tensor;
  const int64_t size = t.dtype().bits / 8, token_bytes = layout.scale_offset / block_size + 2;
  kv_cache.expect_shape({-1, num_kv_heads, block_size, -1});
  const int64_t content = t.size(3);
  kv_cache.expect(content * size >= token_bytes && t.stride(2) == content && is_element(t, layout.element));
}

template <class T>
T* data(const TensorView& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace adamas
