// Clusters of blocks: the cluster barrier, and access to each other's shared memory. A remote store is visible to
// its block after the next cluster barrier. A block must not exit while another one may still access its memory.
#pragma once
#include "sm90/memory.cuh"

namespace adamas {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// Announces no writes, only that the block runs.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address in another block of the cluster that corresponds to this block's shared memory at `p`.
__device__ __forceinline__ uint32_t remote(const void* p, int rank) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
  return at;
}
__device__ __forceinline__ uint4 remote_load16(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ void remote_store16(uint32_t at, uint4 x) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void remote_store8(uint32_t at, uint2 x) {
  asm volatile("st.shared::cluster.v2.b32 [%0], {%1,%2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void remote_store(uint32_t at, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}

}  // namespace adamas
