// Stages: runs of up to 64 tokens of a context, whose signatures a warp streams through shared memory (pipeline.cuh).
#pragma once
#include "sm90/address.cuh"

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
  // Whether a stage is a block.
  __device__ __forceinline__ bool one_block() const { return parts == 1 && whole_blocks; }
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

}  // namespace adamas
