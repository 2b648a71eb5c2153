// A warp's ring of stages on Hopper, filled by bulk copies. Each slot has a barrier.
#pragma once
#include "sm90/barrier.cuh"
#include "sm90/memory.cuh"
#include "sm90/stage.cuh"

namespace adamas {

// Copies the signatures of `tokens` tokens of a block, from its `first` one on, plane by plane.
__device__ __forceinline__ void copy_planes(uint32_t to, const uint8_t* block, int hi_offset, int lo_offset,
                                            int scale_offset, int first, int tokens, int token_bytes,
                                            uint32_t barrier) {
  const int plane = tokens * token_bytes;
  bulk_copy(to, block + hi_offset + first * token_bytes, plane, barrier);
  bulk_copy(to + plane, block + lo_offset + first * token_bytes, plane, barrier);
  bulk_copy(to + 2 * plane, block + scale_offset + first * 2, tokens * 2, barrier);
}

inline __device__ __noinline__ void copy_planes_apart(uint32_t to, const uint8_t* block, int hi_offset, int lo_offset,
                                                      int scale_offset, int first, int tokens, int token_bytes,
                                                      uint32_t barrier) {
  copy_planes(to, block, hi_offset, lo_offset, scale_offset, first, tokens, token_bytes, barrier);
}

template <int kStages>
class StageRing {
 public:
  // One ring per warp. memory: kStages * bytes, aligned to 16; barriers: kStages. `fresh`: the barriers are not
  // initialised yet.
  __device__ StageRing(uint8_t* memory, uint64_t* barriers, int bytes, bool fresh = true)
      : data_(shared_address(memory)),
        barriers_(shared_address(barriers)),
        bytes_(bytes) {
    if (fresh && threadIdx.x % 32 == 0) {
      for (int i = 0; i < kStages; ++i) barrier_init(barriers_ + i * 8);
      barrier_init_done();
    }
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t data(int slot) const { return data_ + slot * bytes_; }

  // Fetches the stage that starts at `token` of a context of `length` tokens. block: from load_stage_block(). All
  // lanes call it, and none may still read the slot.
  __device__ __forceinline__ void fill(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                       int token, int length, uint32_t block) const {
    const int lane = threadIdx.x % 32;
    const int parts =
        shape.parts == 1 ? 1 : min(shape.parts, (length - token + shape.part_tokens - 1) / shape.part_tokens);
    fill_parts(slot, page, shape, pages, token + lane * shape.part_tokens, lane < parts, parts, block);
  }

  // Fetches a stage of `parts` parts from anywhere, which the first lanes have; this lane's one, if it `has` any, starts at
  // `token`, in `block`. kApart: not inlined where a stage is not of whole blocks.
  template <bool kApart = false>
  __device__ __forceinline__ void fill_parts(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                             int token, bool has, int parts, uint32_t block) const {
    const int lane = threadIdx.x % 32;
    const uint32_t barrier = barriers_ + slot * 8;
    if (lane == 0) barrier_expect(barrier, parts * shape.part_bytes);
    if (has) {
      const uint32_t to = data(slot) + lane * shape.part_bytes;
      const uint8_t* from = pages + uint64_t(block) * page.block_stride;
      if (shape.whole_blocks) {
        bulk_copy(to, from + page.hi_offset, shape.part_bytes, barrier);
      } else {
        constexpr auto* copy = kApart ? copy_planes_apart : copy_planes;
        copy(to, from, page.hi_offset, page.lo_offset, page.scale_offset, token % page.block_size, shape.part_tokens,
             shape.words * 4, barrier);
      }
    }
  }

  // The same, not inlined, for a loop whose stages are mostly one copy.
  __device__ __noinline__ void fill_apart(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                          int token, bool has, uint32_t block) const {
    fill_parts(slot, page, shape, pages, token, has, __popc(__ballot_sync(kFull, has)), block);
  }

  // The same if a stage is one contiguous copy.
  __device__ __forceinline__ void fill(int slot, const uint8_t* from, int bytes) const {
    if (threadIdx.x % 32) return;
    barrier_expect(barriers_ + slot * 8, bytes);
    bulk_copy(data(slot), from, bytes, barriers_ + slot * 8);
  }

  // In place of a fill() of a stage that does not exist.
  __device__ __forceinline__ void fill_nothing() const {}

  __device__ __forceinline__ void wait(int slot, uint32_t phase) const { barrier_wait(barriers_ + slot * 8, phase); }

 private:
  uint32_t data_, barriers_;
  int bytes_;
};

}  // namespace adamas
