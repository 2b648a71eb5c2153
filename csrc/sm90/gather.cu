// gather: copies K and V of whole contexts from the pages, back to back; one warp per (token, KV head) at a time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "sm90/launch.cuh"
#include "sm90/rows.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float from_fp8(uint8_t x, Element element) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, element == Element::e4m3 ? __NV_E4M3 : __NV_E5M2)));
}

// Stores four fp8 values as bf16 or fp16.
__device__ __forceinline__ void store4(uint8_t* to, uint32_t x, float scale, Element from, Element element) {
  uint16_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = from_fp8(uint8_t(x >> 8 * i), from) * scale;
    out[i] = element == Element::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                      : __half_as_ushort(__float2half_rn(value));
  }
  auto words = reinterpret_cast<uint32_t*>(to);
  words[0] = out[0] | uint32_t(out[1]) << 16;
  words[1] = out[2] | uint32_t(out[3]) << 16;
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  const Page& page = p.page;
  const int row = blockIdx.y, lane = threadIdx.x % 32;
  int64_t start = 0;
  for (int r = lane; r < row; r += 32) start += context_length(p, r);
#pragma unroll
  for (int step = 16; step; step /= 2) start += __shfl_xor_sync(kFull, start, step);
  const int row_bytes = page.head_size * (page.fp8() ? 1 : 2);
  const int length = int(min(int64_t(context_length(p, row)), p.num_tokens - start));
  const int warps = gridDim.x * kThreads / 32, items = length * page.num_kv_heads;
  for (int i = (blockIdx.x * kThreads + threadIdx.x) / 32; i < items; i += warps) {
    const int token = i / page.num_kv_heads, head = i % page.num_kv_heads;
    const int block = token / page.block_size, offset = token % page.block_size;
    const uint8_t* run = page.base + p.block_table[row * p.blocks_per_row + block] * int64_t(page.block_stride) +
                         head * page.head_stride + offset * row_bytes;
    auto to = [&](const Rows& rows) {
      return static_cast<uint8_t*>(rows.data) + ((start + token) * rows.token_stride + head * rows.head_stride) * 2;
    };
    if (page.fp8()) {
      for (int d = lane * 4; d < page.head_size; d += 32 * 4) {
        const uint32_t k = *reinterpret_cast<const uint32_t*>(run + d);
        const uint32_t v = *reinterpret_cast<const uint32_t*>(run + page.v_offset + d);
        store4(to(p.key) + 2 * d, k, page.k_scale, page.element, p.key.element);
        store4(to(p.value) + 2 * d, v, page.v_scale, page.element, p.value.element);
      }
      continue;
    }
    for (int b = lane * 4; b < row_bytes; b += 32 * 4) {
      *reinterpret_cast<uint32_t*>(to(p.key) + b) = *reinterpret_cast<const uint32_t*>(run + b);
      *reinterpret_cast<uint32_t*>(to(p.value) + b) = *reinterpret_cast<const uint32_t*>(run + page.v_offset + b);
    }
  }
}

}  // namespace

void gather(const GatherParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const int blocks = 16 * num_multiprocessors();  // one wave, shared by the rows
  launch(gather_kernel, dim3((blocks + p.num_rows - 1) / p.num_rows, p.num_rows), kThreads, 0, stream, false, "gather",
         p);
}

}  // namespace adamas
