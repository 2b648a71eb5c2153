// A warp's ring of signature stages in shared memory, filled by the bulk copy engine.
//
// A stage is up to 64 tokens. The signature planes of a block lie back to back, so a block of up to
// 64 tokens is one copy. Plain loads in fragment order would ask for the planes in halves of cache
// lines, which costs a third of the bandwidth; the copy engine reads whole lines.
#pragma once
#include "common.cuh"

namespace adamas {

constexpr int kStageTokens = 64;

// How stages are made of blocks: `parts` pieces of `part_tokens` tokens each.
struct StageShape {
  int tokens, part_tokens, parts, part_bytes, words;
  bool whole_blocks;

  __host__ __device__ StageShape(const Page& page) {
    words = page.words;
    whole_blocks = page.block_size <= kStageTokens;
    part_tokens = page.block_size;
    if (!whole_blocks)
      for (part_tokens = kStageTokens; page.block_size % part_tokens; part_tokens /= 2) {
      }
    parts = kStageTokens / part_tokens;
    tokens = parts * part_tokens;
    part_bytes = part_tokens * (page.head_size / 4 + 2);
  }
};

inline int stage_bytes(const Page& page) { return kStageTokens * (page.head_size / 4 + 2); }

template <int kStages>
class StageRing {
 public:
  // memory: kStages * bytes, aligned to 16; barriers: kStages. Call once per warp.
  __device__ StageRing(uint8_t* memory, uint64_t* barriers, int bytes)
      : data_(uint32_t(__cvta_generic_to_shared(memory))),
        barriers_(uint32_t(__cvta_generic_to_shared(barriers))),
        bytes_(bytes) {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < kStages; ++i)
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers_ + i * 8) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t data(int slot) const { return data_ + slot * bytes_; }

  // Fetches the stage that starts at `token` of a context. block: this lane's block, if it is below
  // the number of parts. Every lane calls it; no lane may still read the slot.
  __device__ __forceinline__ void fill(int slot, const Page& page, const StageShape& shape, const uint8_t* run,
                                       int token, int length, uint32_t block) {
    const int lane = threadIdx.x % 32;
    const int parts = min(shape.parts, (length - token + shape.part_tokens - 1) / shape.part_tokens);
    const uint32_t barrier = barriers_ + slot * 8;
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(parts * shape.part_bytes)
                   : "memory");
    if (lane < parts) {
      const uint32_t to = data(slot) + lane * shape.part_bytes;
      const uint8_t* from = run + uint64_t(block) * page.block_stride;
      if (shape.whole_blocks) {
        copy(to, from + page.hi_offset, shape.part_bytes, barrier);
      } else {
        const int inside = (token + lane * shape.part_tokens) % page.block_size;
        const int plane = shape.part_tokens * shape.words * 4;
        copy(to, from + page.hi_offset + inside * shape.words * 4, plane, barrier);
        copy(to + plane, from + page.lo_offset + inside * shape.words * 4, plane, barrier);
        copy(to + 2 * plane, from + page.scale_offset + inside * 2, shape.part_tokens * 2, barrier);
      }
    }
  }

  __device__ __forceinline__ void wait(int slot, uint32_t phase) const {
    asm volatile(
        "{ .reg .pred p; AGAIN_%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra DONE_%=; bra AGAIN_%=; DONE_%=: }" ::"r"(
            barriers_ + slot * 8),
        "r"(phase)
        : "memory");
  }

 private:
  static __device__ __forceinline__ void copy(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
  }

  uint32_t data_, barriers_;
  int bytes_;
};

}  // namespace adamas
