// Element types, and tensors of heads.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ADAMAS_BOTH __host__ __device__
#else
#define ADAMAS_BOTH
#endif

namespace adamas {

// The numbers match vllm_adamas/dtypes.py.
enum class Element : int { f32 = 0, bf16 = 1, f16 = 2, e4m3 = 3, e5m2 = 4 };

ADAMAS_BOTH constexpr bool is_fp8(Element element) { return element == Element::e4m3 || element == Element::e5m2; }

// A [tokens, heads, head_size] tensor with a contiguous last dimension; strides in elements.
struct Rows {
  void* data;
  int64_t token_stride, head_stride;
  Element element;
};

}  // namespace adamas
