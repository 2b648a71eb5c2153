// Scores of tokens directly from the page, by one warp: for encode's sample, whose tiles are scattered, and for
// attend's rescan. Whole contexts are streamed through stages (pipeline.cuh) instead.
#pragma once
#include "sm90/address.cuh"
#include "sm90/memory.cuh"
#include "sm90/score.cuh"

namespace adamas {

// Loads the signatures of one KV head from the page into registers; four lanes share a token quad, one word each.
template <int kChunks, Mode kMode>
struct SignatureReader {
  const uint8_t* hi[kChunks];  // this lane's words in block 0
  uint32_t lo, scale;          // from hi to lo, and from the head's run to the scales
  const uint8_t* run;
  uint32_t block_stride, quads_per_block, quad_magic, tile_bytes;

  __device__ SignatureReader(const Page& page, int kv_head) {
    run = page.base + kv_head * page.head_stride;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int word = int(threadIdx.x % 4) + 4 * k;
      hi[k] = run + page.hi_offset + (word < page.words ? word : 0) * kTile * 4;
    }
    lo = uint32_t(page.lo_offset - page.hi_offset);
    scale = uint32_t(page.scale_offset);
    block_stride = page.block_stride;
    quads_per_block = page.block_size / kQuad;
    quad_magic = page.quad_magic;
    tile_bytes = page.words * kTile * 4;
  }

  __device__ __forceinline__ uint32_t index(uint32_t quad) const { return block_index(quad_magic, quad); }

  struct Place {  // offsets of a quad from the start of the head's first block
    uint64_t words, scale;
  };
  __device__ __forceinline__ Place place(uint32_t quad, uint32_t block) const {
    const uint32_t inside = quad - index(quad) * quads_per_block;
    const uint64_t at = uint64_t(block) * block_stride;
    return {at + (inside / 4 * tile_bytes + inside % 4 * 16), at + (scale + inside * 8)};
  }

  __device__ __forceinline__ void load(Signatures<kChunks, kMode>& to, const Place& from) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      to.hi[k] = load16(hi[k] + from.words);
      to.lo[k] = load16(hi[k] + from.words + lo);
    }
    if (is_dot(kMode)) to.scale = load8(run + from.scale);
  }

  // Into the L2 cache only, which stays coherent if the preceding kernel still writes there.
  __device__ __forceinline__ void prefetch(const Place& from) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      prefetch_l2(hi[k] + from.words);
      prefetch_l2(hi[k] + from.words + lo);
    }
    if (is_dot(kMode)) prefetch_l2(run + from.scale);
  }
};

// Reads `steps` steps of 8 token quads (32 tokens) of one (row, KV head). Signatures are loaded kDepth steps ahead of
// the scores, and block table entries twice as far; kDepth is limited by registers.
//   lane_quad(step) this lane's token quad
//   begin()         called before the first signature is read, after the first prefetches to the L2 cache
//   ready()         called after the first loads are issued, before the first score
//   sink(step, the quad's first token, its signatures)
template <int kChunks, Mode kMode, class LaneQuad, class Begin, class Ready, class Sink>
__device__ __forceinline__ void scan_quads(const Page& page, int kv_head, const int32_t* blocks, int length,
                                           int steps, LaneQuad lane_quad, Begin begin, Ready ready, Sink sink) {
  constexpr int kDepth = kChunks == 1 ? 4 : 2;
  const SignatureReader<kChunks, kMode> reader(page, kv_head);
  const uint32_t last = uint32_t(length - 1) / kQuad;
  auto quad_at = [&](int step) { return min(uint32_t(lane_quad(step)), last); };  // clamped to the last quad
  uint32_t block[kDepth];
  Signatures<kChunks, kMode> data[kDepth];
  auto fetch_block = [&](int step) { return uint32_t(__ldg(blocks + reader.index(quad_at(step)))); };
  typename SignatureReader<kChunks, kMode>::Place place[kDepth];
  if (steps > 0) {  // steps past the last one load a quad that is not scored
#pragma unroll
    for (int i = 0; i < kDepth; ++i) block[i] = fetch_block(i);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) place[i] = reader.place(quad_at(i), block[i]);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) reader.prefetch(place[i]);
  }
  begin();
  if (steps > 0) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) reader.load(data[i], place[i]);
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (kDepth + i < steps) block[i] = fetch_block(kDepth + i);
  }
  ready();
  for (int step = 0; step < steps; step += kDepth) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (step + i >= steps) break;
      sink(step + i, lane_quad(step + i) * kQuad, data[i]);
      if (step + i + kDepth < steps) reader.load(data[i], reader.place(quad_at(step + i + kDepth), block[i]));
      if (step + i + 2 * kDepth < steps) block[i] = fetch_block(step + i + 2 * kDepth);
    }
  }
}

}  // namespace adamas
