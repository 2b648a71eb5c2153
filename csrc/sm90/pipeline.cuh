// The signatures of a context, streamed through shared memory. Each warp has a ring of stages of up to 64 tokens. It
// fills them ahead of use by bulk copies and waits for them alone, without a barrier of the block.
//
// The signature planes of a block are contiguous, so a block of up to 64 tokens is one copy. Plain loads in fragment
// order would read the planes in half cache lines, which costs a third of the bandwidth; the copy engine reads whole
// lines.
#pragma once
#include "sm90/address.cuh"
#include "sm90/barrier.cuh"
#include "sm90/score.cuh"

namespace adamas {

constexpr int kStageTokens = 64;

// The parts of a stage: `parts` runs of `part_tokens` tokens, each within one block.
struct StageShape {
  int tokens, part_tokens, parts, part_bytes, words;
  bool whole_blocks;

  StageShape() = default;
  // A stage of single tiles.
  static __device__ __forceinline__ StageShape of_tiles(const Page& page) {
    StageShape shape;
    shape.words = page.words, shape.whole_blocks = false, shape.tokens = kStageTokens;
    shape.part_tokens = kTile, shape.parts = kStageTokens / kTile;
    shape.part_bytes = kTile * (page.head_size / 4 + 2);
    return shape;
  }
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

// The block that holds this lane's part of the stage that starts at `token`. Lanes without a part or with one at or
// past `end` get 0 and load nothing; so do all lanes if the stage is not `wanted`.
__device__ __forceinline__ uint32_t load_stage_block(const DecodeParams& p, const StageShape& shape,
                                                     const int32_t* blocks, int token, int end, bool wanted = true) {
  const int lane = threadIdx.x % 32, first = token + lane * shape.part_tokens;
  return lane < shape.parts && wanted && first < end ? __ldg(blocks + block_index(p.page, first / kQuad)) : 0;
}

// Shared memory of a stage, for any block size.
inline int stage_bytes(const Page& page) { return kStageTokens * (page.head_size / 4 + 2); }

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
  // lanes call it, and none may still read the slot. kApart: not inlined where a stage is not of whole blocks.
  template <bool kApart = false>
  __device__ __forceinline__ void fill(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                       int token, int length, uint32_t block) const {
    const int parts =
        shape.parts == 1 ? 1 : min(shape.parts, (length - token + shape.part_tokens - 1) / shape.part_tokens);
    fill_parts<kApart>(slot, page, shape, pages, token + int(threadIdx.x % 32) * shape.part_tokens, parts, block);
  }

  // Fetches a stage of `parts` parts from anywhere; this lane's one starts at `token`, in `block`.
  template <bool kApart = false>
  __device__ __forceinline__ void fill_parts(int slot, const Page& page, const StageShape& shape, const uint8_t* pages,
                                             int token, int parts, uint32_t block) const {
    const int lane = threadIdx.x % 32;
    const uint32_t barrier = barriers_ + slot * 8;
    if (lane == 0) barrier_expect(barrier, parts * shape.part_bytes);
    if (lane < parts) {
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

  // The same if a stage is one contiguous copy.
  __device__ __forceinline__ void fill(int slot, const uint8_t* from, int bytes) const {
    if (threadIdx.x % 32) return;
    barrier_expect(barriers_ + slot * 8, bytes);
    bulk_copy(data(slot), from, bytes, barriers_ + slot * 8);
  }

  __device__ __forceinline__ void wait(int slot, uint32_t phase) const { barrier_wait(barriers_ + slot * 8, phase); }

 private:
  uint32_t data_, barriers_;
  int bytes_;
};

// Loads a lane's token quads from a stage.
template <int kChunks, Mode kMode>
struct StageReader {
  static constexpr int kStep = 32;  // tokens that a warp scores at a time
  static constexpr int kSteps = kStageTokens / kStep;

  int token[kSteps];  // first token of the lane's quad; past the stage's end, one that no context has

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
      to.hi[k] = load_shared16(data + quad_at_[i] + word_at_[k]);
      to.lo[k] = load_shared16(data + quad_at_[i] + word_at_[k] + plane_bytes_);
    }
    if (is_dot(kMode)) to.scale = load_shared8(data + scale_at_[i]);
  }

 private:
  uint32_t quad_at_[kSteps], scale_at_[kSteps], word_at_[kChunks], plane_bytes_;
};

}  // namespace adamas
