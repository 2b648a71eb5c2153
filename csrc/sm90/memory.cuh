// Loads and asynchronous copies by one thread, and the padding of arrays in shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace adamas {

// -- global memory that is read-only while the kernel runs --

__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ uint2 load8(const void* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }

// For lanes that load different parts of a cache line at different times: L2 fetches the whole line at once.
__device__ __forceinline__ uint4 load16_line(const void* p) {
  uint4 x;
  asm("ld.global.nc.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
__device__ __forceinline__ uint2 load8_line(const void* p) {
  uint2 x;
  asm("ld.global.nc.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The same pointer, which the compiler keeps in registers in place of computing it again at every use.
template <class T>
__device__ __forceinline__ T* kept(T* p) {
  asm("" : "+l"(p));
  return p;
}

// -- shared memory --

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at));
  return x;
}
__device__ __forceinline__ uint4 load_shared16(const void* p) { return load_shared16(shared_address(p)); }
__device__ __forceinline__ uint2 load_shared8(const void* p) { return load_shared8(shared_address(p)); }
__device__ __forceinline__ uint32_t load_shared4(const void* p) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(shared_address(p)));
  return x;
}

// Threads that own runs of 2^n elements would all start in the same bank. One word of padding after every 32 words
// separates the starts. Element i is at padded(i), and n elements take padded(n) words.
__host__ __device__ constexpr int padded(int i) { return i + i / 32; }

// -- asynchronous copies from global to shared memory --

__device__ __forceinline__ void copy_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
// Waits for this thread's copies only; other threads see them after a barrier.
__device__ __forceinline__ void wait_for_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace adamas
