// A warp's ring of stages on other GPUs than Hopper, filled by asynchronous copies of 16 bytes by all lanes.
//
// Every fill() is one group of copies. A stage has arrived when only the kStages - 1 fills after its own may be
// pending, so a warp calls fill() or fill_nothing() kStages times ahead and once for each stage that it has read.
#pragma once
#include "sm90/memory.cuh"
#include "sm90/reduce.cuh"
#include "sm90/stage.cuh"

namespace adamas {

template <int kStages>
class StageRing {
 public:
  // One ring per warp. memory: kStages * bytes, aligned to 16. The barriers are those of Hopper's ring.
  __device__ StageRing(uint8_t* memory, uint64_t*, int bytes) : data_(shared_address(memory)), bytes_(bytes) {}

  __device__ __forceinline__ uint32_t data(int slot) const { return data_ + slot * bytes_; }

  // Fetches the stage that starts at `token` of a context of `length` tokens. block: from load_stage_block(). All
  // lanes call it, and none may still read the slot.
  __device__ __forceinline__ void fill(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                       int token, int length, uint32_t block) const {
    const int parts =
        shape.parts == 1 ? 1 : min(shape.parts, (length - token + shape.part_tokens - 1) / shape.part_tokens);
    for (int part = 0; part < parts; ++part) {
      const uint32_t to = data(slot) + part * shape.part_bytes;
      const uint8_t* from = pages + uint64_t(__shfl_sync(kFull, block, part)) * page.block_stride;
      if (shape.whole_blocks) {
        copy(to, from + page.hi_offset, shape.part_bytes);
      } else {
        const int inside = (token + part * shape.part_tokens) % page.block_size;
        const int plane = shape.part_tokens * shape.words * 4;
        copy(to, from + page.hi_offset + inside * shape.words * 4, plane);
        copy(to + plane, from + page.lo_offset + inside * shape.words * 4, plane);
        copy(to + 2 * plane, from + page.scale_offset + inside * 2, shape.part_tokens * 2);
      }
    }
    fill_nothing();
  }

  // The same if a stage is one contiguous copy.
  __device__ __forceinline__ void fill(int slot, const uint8_t* from, int bytes) const {
    copy(data(slot), from, bytes);
    fill_nothing();
  }

  // In place of a fill() of a stage that does not exist.
  __device__ __forceinline__ void fill_nothing() const { asm volatile("cp.async.commit_group;" ::: "memory"); }

  __device__ __forceinline__ void wait(int, uint32_t) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    __syncwarp();  // the copies of the other lanes
  }

 private:
  __device__ __forceinline__ void copy(uint32_t to, const uint8_t* from, int bytes) const {
#pragma unroll 5
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) copy_async16(to + i, from + i);
  }

  uint32_t data_;
  int bytes_;
};

}  // namespace adamas
