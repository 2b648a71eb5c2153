// A warp's ring of signature stages in shared memory, filled by the bulk copy engine.
//
// A stage is up to 64 tokens. The signature planes of a block lie back to back, so a block of up to
// 64 tokens is one copy. Plain loads in fragment order would ask for the planes in halves of cache
// lines, which costs a third of the bandwidth; the copy engine reads whole lines.
#pragma once
#include "sm90/score.cuh"

namespace adamas {

constexpr int kStageTokens = 64;

// A barrier in shared memory that counts one arrival and the bytes that it announces.
__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Once barriers are initialised: the copy engine sees them, and what was stored before.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred p; AGAIN_%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra DONE_%=; bra AGAIN_%=; DONE_%=: }" ::"r"(
          barrier),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// How stages are made of blocks: `parts` pieces of `part_tokens` tokens each.
struct StageShape {
  int tokens, part_tokens, parts, part_bytes, words;
  bool whole_blocks;

  StageShape() = default;
  __host__ __device__ explicit StageShape(const Page& page) {
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
      for (int i = 0; i < kStages; ++i) barrier_init(barriers_ + i * 8);
      barrier_init_done();
    }
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t data(int slot) const { return data_ + slot * bytes_; }

  // Fetches the stage that starts at `token` of a context. block: this lane's block, if it is below
  // the number of parts. Every lane calls it; no lane may still read the slot.
  __device__ __forceinline__ void fill(int slot, const Page& page, const StageShape& shape, const uint8_t* run,
                                       int token, int length, uint32_t block) {
    const int lane = threadIdx.x % 32;
    const int parts = shape.parts == 1 ? 1 : min(shape.parts, (length - token + shape.part_tokens - 1) / shape.part_tokens);
    const uint32_t barrier = barriers_ + slot * 8;
    if (lane == 0) barrier_expect(barrier, parts * shape.part_bytes);
    if (lane < parts) {
      const uint32_t to = data(slot) + lane * shape.part_bytes;
      const uint8_t* from = run + uint64_t(block) * page.block_stride;
      if (shape.whole_blocks) {
        bulk_copy(to, from + page.hi_offset, shape.part_bytes, barrier);
      } else {
        const int inside = (token + lane * shape.part_tokens) % page.block_size;
        const int plane = shape.part_tokens * shape.words * 4;
        bulk_copy(to, from + page.hi_offset + inside * shape.words * 4, plane, barrier);
        bulk_copy(to + plane, from + page.lo_offset + inside * shape.words * 4, plane, barrier);
        bulk_copy(to + 2 * plane, from + page.scale_offset + inside * 2, shape.part_tokens * 2, barrier);
      }
    }
  }

  // The same where a stage is one copy of `bytes`.
  __device__ __forceinline__ void fill(int slot, const uint8_t* from, int bytes) {
    if (threadIdx.x % 32) return;
    barrier_expect(barriers_ + slot * 8, bytes);
    bulk_copy(data(slot), from, bytes, barriers_ + slot * 8);
  }

  __device__ __forceinline__ void wait(int slot, uint32_t phase) const { barrier_wait(barriers_ + slot * 8, phase); }

 private:
  uint32_t data_, barriers_;
  int bytes_;
};

// Where a lane's token quads lie in a stage.
template <int kChunks, Mode kMode>
struct StageReader {
  static constexpr int kStep = 32;  // tokens that a warp scores at a time
  static constexpr int kSteps = kStageTokens / kStep;

  int token[kSteps];  // first token of the lane's quad, out of reach beyond the stage's end

  __device__ explicit StageReader(const StageShape& shape) {
    const int lane = threadIdx.x % 32;
    plane_bytes_ = shape.part_tokens * shape.words * 4;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      int quad = i * (kStep / kQuad) + lane / 4;
      token[i] = quad * kQuad < shape.tokens ? quad * kQuad : INT_MAX / 2;
      if (quad * kQuad >= shape.tokens) quad = 0;
      const int part = shape.parts == 1 ? 0 : quad * kQuad / shape.part_tokens;
      const int inside = quad - part * shape.part_tokens / kQuad;
      quad_at_[i] = part * shape.part_bytes + inside / 4 * shape.words * kTile * 4 + inside % 4 * 16;
      scale_at_[i] = part * shape.part_bytes + 2 * plane_bytes_ + inside * 8;
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) word_at_[k] = (lane % 4 + 4 * k < shape.words ? lane % 4 + 4 * k : 0) * kTile * 4;
  }

  // data: shared address of the stage.
  __device__ __forceinline__ void load(Signatures<kChunks, kMode>& to, uint32_t data, int i) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      to.hi[k] = shared16(data + quad_at_[i] + word_at_[k]);
      to.lo[k] = shared16(data + quad_at_[i] + word_at_[k] + plane_bytes_);
    }
    if (kMode == Mode::dot) to.scale = shared8(data + scale_at_[i]);
  }

 private:
  uint32_t quad_at_[kSteps], scale_at_[kSteps], word_at_[kChunks], plane_bytes_;
};

}  // namespace adamas
