// append: writes K, V and the signature of each token to its slot; one warp per (token, KV head).
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "sm90/launch.cuh"
#include "sm90/memory.cuh"
#include "sm90/rows.cuh"
#include "sm90/signature.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ void copy_vector(uint8_t* to, const Rows& from, int64_t token, int head, int bytes) {
  const int lane = threadIdx.x % 32;
  const int64_t at = (token * from.token_stride + head * from.head_stride) * 2;
  const uint8_t* source = static_cast<const uint8_t*>(from.data) + at;
  if (reinterpret_cast<uintptr_t>(source) % 16 == 0) {
    for (int i = lane * 16; i < bytes; i += 32 * 16) *reinterpret_cast<uint4*>(to + i) = load16(source + i);
  } else {
    for (int i = lane * 2; i < bytes; i += 32 * 2)
      *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(source + i);
  }
}

// Values outside the range of fp8 saturate.
template <int kWords>
__device__ __forceinline__ void store_fp8(uint8_t* to, const float (&x)[kWords], float scale, Element element) {
  const auto kind = element == Element::e4m3 ? __NV_E4M3 : __NV_E5M2;
#pragma unroll
  for (int w = 0; w < kWords; ++w)
    to[w * kWord + threadIdx.x % 32] = __nv_cvt_float_to_fp8(__fdiv_rn(x[w], scale), __NV_SATFINITE, kind);
}

template <int kWords>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  launch_dependents();  // decode waits before it reads pages
  const Page& page = p.page;
  const int lane = threadIdx.x % 32;
  const int64_t item = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t token = item / page.num_kv_heads;
  const int head = int(item % page.num_kv_heads);
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slots[token];
  if (uint64_t(slot) >= uint64_t(p.num_slots)) return;
  const int offset = int(slot % page.block_size);
  uint8_t* run = page.base + slot / page.block_size * int64_t(page.block_stride) + head * page.head_stride;

  float x[kWords];
  load_vector(x, p.key, token, head, kWords);
  if (page.fp8()) {
    float v[kWords];
    load_vector(v, p.value, token, head, kWords);
    store_fp8(run + offset * page.head_size, x, page.k_scale, page.element);
    store_fp8(run + page.v_offset + offset * page.head_size, v, page.v_scale, page.element);
  } else {
    const int row_bytes = page.head_size * 2;
    copy_vector(run + offset * row_bytes, p.key, token, head, row_bytes);
    copy_vector(run + page.v_offset + offset * row_bytes, p.value, token, head, row_bytes);
  }

  hadamard(x, page.head_size, p.norm);
  if (p.key_mean) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) x[w] -= __ldg(p.key_mean + head * page.head_size + w * kWord + lane);
  }
  const float t = outer_threshold(x, p.coding, page.head_size);
  const int at = offset / kTile * kWords * kTile + offset % kTile;
  float product = 0, squares = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int code = bucketize(x[w], t);
    const float level = float(2 * code - 3);
    product += x[w] * level;
    squares += level * level;
    const uint32_t hi = __ballot_sync(kFull, code >> 1), lo = __ballot_sync(kFull, code & 1);
    if (lane == 0) {
      reinterpret_cast<uint32_t*>(run + page.hi_offset)[at + w * kTile] = hi;
      reinterpret_cast<uint32_t*>(run + page.lo_offset)[at + w * kTile] = lo;
    }
  }
  float scale = warp_sum(product) / warp_sum(squares);
  scale = scale == scale ? fminf(fmaxf(scale, -65504.0f), 65504.0f) : 0.0f;
  if (lane == 0) reinterpret_cast<__half*>(run + page.scale_offset)[offset] = __float2half_rn(scale);
}

}  // namespace

void append(const AppendParams& p, void* stream) {
  if (p.num_tokens == 0) return;
  const int64_t warps = p.num_tokens * p.page.num_kv_heads;
  const dim3 grid(unsigned((warps * 32 + kThreads - 1) / kThreads));
  auto run = [&](auto kernel) { launch(kernel, grid, kThreads, 0, stream, false, "append", p); };
  switch (p.page.words) {
    case 2: return run(append_kernel<2>);
    case 3: return run(append_kernel<3>);
    case 4: return run(append_kernel<4>);
    case 6: return run(append_kernel<6>);
    case 8: return run(append_kernel<8>);
  }
}

}  // namespace adamas
