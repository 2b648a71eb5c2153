// Barriers in shared memory (mbarrier) and the bulk copies that complete on them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace adamas {

// A barrier whose phase completes after one arrival and the bytes that arrival expects.
__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Makes initialised barriers and earlier stores visible to the copy engine (the async proxy).
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Orders this thread's accesses to shared memory before copies that are issued after a barrier of the block.
__device__ __forceinline__ void async_copies_follow() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the phase of this parity. Asm labels need a unique name (%=), because the function is inlined.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred p;\n"
      "AGAIN_%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra DONE_%=; bra AGAIN_%=;\n"
      "DONE_%=: }" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
// Copies `bytes`, a multiple of 16, from global to shared memory; they count towards the barrier. Called by one thread.
__device__ __forceinline__ void bulk_copy(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace adamas
