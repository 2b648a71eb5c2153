// The signatures of a context, streamed through shared memory. Each warp has a ring of stages of up to 64 tokens
// (ring.cuh). It fills them ahead of use by asynchronous copies and waits for them alone, without a barrier of the
// block. Copies are bulk copies on Hopper (csrc/sm90), and of 16 bytes per lane on other GPUs (csrc/sm80).
//
// The signature planes of a block are contiguous, so a block of up to 64 tokens is one copy. Plain loads in fragment
// order would read the planes in half cache lines, which costs a third of the bandwidth; these copies read whole
// lines.
#pragma once
#ifdef ADAMAS_SM80
#include "sm80/ring.cuh"
#else
#include "sm90/ring.cuh"
#endif
#include "sm90/score.cuh"

namespace adamas {

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
