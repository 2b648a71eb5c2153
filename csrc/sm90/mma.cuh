// Tensor core instructions for K, V and queries, and the conversions around them. All lanes of a warp execute them;
// fragments have the layout that PTX defines for mma.sync.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace adamas {

// c += a b for 16-bit T: 16 x 16 by 16 x 8 values, accumulated in float. pack() rounds two floats to T.
template <class T>
struct Mma;

template <>
struct Mma<__nv_bfloat16> {
  static __device__ __forceinline__ void run(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static __device__ __forceinline__ uint32_t from_half2(uint32_t x) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&x));
    return pack(f.x, f.y);
  }
};

template <>
struct Mma<__half> {
  static __device__ __forceinline__ void run(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static __device__ __forceinline__ uint32_t from_half2(uint32_t x) { return x; }
};

// Transposes an 8 x 8 matrix of 16-bit values that the lanes hold as an mma fragment.
__device__ __forceinline__ uint32_t transpose8(uint32_t x) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t word_at(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Two e4m3 values in the upper bytes of x as fp16, exactly, for GPUs without such an instruction: exponents differ by 8.
__device__ __forceinline__ uint32_t half2_from_e4m3(uint32_t x) {
  const uint32_t magnitude = (x & 0x7f007f00) >> 1;
  uint32_t half2;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(half2) : "r"(magnitude), "r"(0x5c005c00));  // times 256
  const uint32_t nan = (magnitude + 0x00800080) >> 7 & 0x00800080;                   // of 0x7f alone
  return half2 | (x & 0x80008000) | nan * 0xfc;
}

// Converts 4 fp8 values to T, exactly: fp16 and bf16 represent every fp8 value. An e5m2 value is the upper byte of
// the same value in fp16.
template <class T>
__device__ __forceinline__ uint2 from_fp8(uint32_t x, bool e5m2) {
  uint32_t low, high;
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
      : "=r"(low), "=r"(high)
      : "r"(x));
  if (e5m2) low = __byte_perm(x, 0, 0x1404), high = __byte_perm(x, 0, 0x3424);
#else
  low = __byte_perm(x, 0, 0x1404), high = __byte_perm(x, 0, 0x3424);
  if (!e5m2) low = half2_from_e4m3(low), high = half2_from_e4m3(high);
#endif
  return {Mma<T>::from_half2(low), Mma<T>::from_half2(high)};
}

template <class T>
__device__ __forceinline__ uint4 from_fp8(uint2 x, bool e5m2) {
  const uint2 low = from_fp8<T>(x.x, e5m2), high = from_fp8<T>(x.y, e5m2);
  return {low.x, low.y, high.x, high.y};
}

}  // namespace adamas
