// Scores of tokens from their signatures, on the binary tensor cores; one warp works alone.
//
// An instruction multiplies (AND, population count) 16 tokens x 128 bits with 8 columns. With
// head quads of four heads a lane (row = lane / 4, c = lane % 4) ends up with the whole score of head
// c for its own four tokens, without any exchange between lanes:
//
//   dot        q.level = sum_b w_b * (4 popc(hi & q_b) + 2 popc(lo & q_b)) - 3 sum(q), w = 1 2 4 -8.
//              Columns 2c and 2c+1 of two instructions hold the planes q_0 .. q_3 of head c. The hi
//              plane goes in twice, so that the accumulator is 2 popc(hi & q_b) + popc(lo & q_b).
//   manhattan  |a - b|_1 = |a|_1 + |b|_1 - 2 popc(a AND b) over the thermometer planes hi|lo, hi,
//              hi&lo. Column 2c holds head c, column 2c+1 all ones, which yields |a|_1.
//
// A 16-byte load brings one word of four tokens, so a lane's own quad of tokens is what it loads.
#pragma once
#include "sm90/common.cuh"

namespace adamas {

__device__ __forceinline__ void mma128(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Two accumulators of the same tokens, side by side: the second instruction finds the tokens where the first
// has fetched them.
__device__ __forceinline__ void mma128(int (&c)[4], int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, uint32_t e) {
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%8,%9}, {%10}, {%0,%1,%2,%3};\n"
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%4,%5,%6,%7}, {%8,%9}, {%11}, {%4,%5,%6,%7};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(e));
}

constexpr int query_planes(Mode mode) { return mode == Mode::dot ? 2 : 3; }

// The encoded queries of one (row, KV head) as this lane's fragments.
template <int kChunks, Mode kMode, int kQuads>
struct QueryFragments {
  static constexpr int kPlanes = query_planes(kMode);
  uint32_t plane[kQuads][kPlanes][kChunks];
  int bias[kQuads];
  const uint32_t* more = nullptr;  // manhattan_sum: fragments of the head quads after the first
  int num_more = 0;

  // planes: [head quad][plane][chunk][32 lanes]; biases: [head quad][4]
  __device__ void load(const uint32_t* planes, const int32_t* biases, int head_quads) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < kPlanes; ++i)
#pragma unroll
        for (int k = 0; k < kChunks; ++k)
          plane[q][i][k] = q < head_quads ? planes[((q * kPlanes + i) * kChunks + k) * 32 + lane] : 0;
      bias[q] = q < head_quads ? biases[q * 4 + lane % 4] : 0;
    }
    if (kMode == Mode::manhattan_sum) {
      more = planes + kPlanes * kChunks * 32 + lane;
      num_more = head_quads - 1;
    }
  }
};

// Signature words of one quad of tokens: word c (and c + 4) of both planes, and the four scales.
// Lanes whose word lies beyond the head size load word 0; their query planes are zero.
template <int kChunks, Mode kMode>
struct Signatures {
  uint4 hi[kChunks], lo[kChunks];
  uint2 scale;
};

// Where the signatures of one KV head lie.
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

  __device__ __forceinline__ uint32_t block_of(uint32_t quad) const { return __umulhi(quad, quad_magic); }

  struct Place {  // of a quad, from the start of the head's first block
    uint64_t words, scale;
  };
  __device__ __forceinline__ Place place(uint32_t quad, uint32_t block) const {
    const uint32_t inside = quad - block_of(quad) * quads_per_block;
    const uint64_t at = uint64_t(block) * block_stride;
    return {at + (inside / 4 * tile_bytes + inside % 4 * 16), at + (scale + inside * 8)};
  }

  __device__ __forceinline__ void load(Signatures<kChunks, kMode>& to, const Place& from) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      to.hi[k] = load16(hi[k] + from.words);
      to.lo[k] = load16(hi[k] + from.words + lo);
    }
    if (kMode == Mode::dot) to.scale = load8(run + from.scale);
  }

  // The same into the L2 cache. The kernel in front may still write there.
  __device__ __forceinline__ void prefetch(const Place& from) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      prefetch_line(hi[k] + from.words);
      prefetch_line(hi[k] + from.words + lo);
    }
    if (kMode == Mode::dot) prefetch_line(run + from.scale);
  }
};

template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                           const Signatures<kChunks, kMode>& s, int q, float (&score)[4]) {
  uint32_t hi[kChunks][4], lo[kChunks][4];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    hi[k][0] = s.hi[k].x, hi[k][1] = s.hi[k].y, hi[k][2] = s.hi[k].z, hi[k][3] = s.hi[k].w;
    lo[k][0] = s.lo[k].x, lo[k][1] = s.lo[k].y, lo[k][2] = s.lo[k].z, lo[k][3] = s.lo[k].w;
  }
  int value[4];
  if constexpr (kMode == Mode::dot) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const uint32_t h0 = hi[k][2 * pair], h1 = hi[k][2 * pair + 1];
        const uint32_t l0 = lo[k][2 * pair], l1 = lo[k][2 * pair + 1];
        const uint32_t b0 = query.plane[q][0][k], b1 = query.plane[q][1][k];
        mma128(low, high, h0, h1, b0, b1);
        mma128(low, high, h0, h1, b0, b1);
        mma128(low, high, l0, l1, b0, b1);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        value[2 * pair + i] =
            2 * (low[2 * i] + 2 * low[2 * i + 1] + 4 * high[2 * i] - 8 * high[2 * i + 1]) - query.bias[q];
    }
    const float2 s01 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.x));
    const float2 s23 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.y));
    score[0] = __fmul_rn(float(value[0]), s01.x);
    score[1] = __fmul_rn(float(value[1]), s01.y);
    score[2] = __fmul_rn(float(value[2]), s23.x);
    score[3] = __fmul_rn(float(value[3]), s23.y);
  } else {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      int sum[4] = {0, 0, 0, 0};
      uint32_t any[kChunks][2], both[kChunks][2];
#pragma unroll
      for (int k = 0; k < kChunks; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          any[k][i] = hi[k][2 * pair + i] | lo[k][2 * pair + i];
          both[k][i] = hi[k][2 * pair + i] & lo[k][2 * pair + i];
        }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const uint32_t(&b)[3][kChunks] = query.plane[q];
        mma128(sum, any[k][0], any[k][1], b[0][k]);
        mma128(sum, hi[k][2 * pair], hi[k][2 * pair + 1], b[1][k]);
        mma128(sum, both[k][0], both[k][1], b[2][k]);
      }
      int norm[2] = {sum[1], sum[3]};
      if constexpr (kMode == Mode::manhattan_sum) {
        for (int m = 0; m < query.num_more; ++m) {
          int extra[4] = {0, 0, 0, 0};
          const uint32_t* from = query.more + m * 3 * kChunks * 32;
#pragma unroll
          for (int k = 0; k < kChunks; ++k) {
            const uint32_t b0 = from[k * 32], b1 = from[(kChunks + k) * 32], b2 = from[(2 * kChunks + k) * 32];
            mma128(extra, any[k][0], any[k][1], b0);
            mma128(extra, hi[k][2 * pair], hi[k][2 * pair + 1], b1);
            mma128(extra, both[k][0], both[k][1], b2);
          }
          sum[0] += extra[0];
          sum[2] += extra[2];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int x = 2 * sum[2 * i];
          x += __shfl_xor_sync(kFull, x, 1);
          x += __shfl_xor_sync(kFull, x, 2);
          // The bias carries the group's size in its low bits: bias = |b| summed * 32 + heads.
          value[2 * pair + i] = x - (query.bias[q] & 31) * norm[i] - (query.bias[q] >> 5);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) value[2 * pair + i] = 2 * sum[2 * i] - norm[i] - query.bias[q];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = float(value[i]);
  }
}

// What one warp scans: `steps` steps of 8 token quads (32 tokens) of one (row, KV head).
//   quad_of(step)  this lane's token quad
//   begin()        called before the first signature is read, once the first are on their way to the L2 cache
//   ready()        called once the first loads are on their way, before the first score
//   sink(step, first token, head quad, scores of four tokens for head lane % 4)
template <int kChunks, Mode kMode, int kQuads, class QuadOf, class Begin, class Ready, class Sink>
__device__ __forceinline__ void scan_quads(const Page& page, int kv_head, const int32_t* blocks, int length,
                                           const QueryFragments<kChunks, kMode, kQuads>& query, int steps,
                                           QuadOf quad_of, Begin begin, Ready ready, Sink sink) {
  constexpr int kDepth = kChunks == 1 ? 4 : 2;
  const SignatureReader<kChunks, kMode> reader(page, kv_head);
  const uint32_t last = uint32_t(length - 1) / kQuad;
  auto quad_at = [&](int step) { return min(uint32_t(quad_of(step)), last); };  // a quad that exists
  uint32_t block[kDepth];
  Signatures<kChunks, kMode> data[kDepth];
  auto fetch_block = [&](int step) { return uint32_t(__ldg(blocks + reader.block_of(quad_at(step)))); };
  typename SignatureReader<kChunks, kMode>::Place place[kDepth];
  if (steps > 0) {  // beyond the last step the last quad is loaded, for nothing
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
      const int token = quad_of(step + i) * kQuad;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        float score[4];
        score_quad(query, data[i], q, score);
        sink(step + i, token, q, score);
      }
      if (step + i + kDepth < steps) reader.load(data[i], reader.place(quad_at(step + i + kDepth), block[i]));
      if (step + i + 2 * kDepth < steps) block[i] = fetch_block(step + i + 2 * kDepth);
    }
  }
}

// Calls a kernel launcher with the template arguments that the parameters ask for.
template <class Launch>
void with_scan_types(const DecodeParams& p, Launch launch_it) {
  auto by_quads = [&](auto chunks, auto mode) {
    using std::integral_constant;
    if (mode() == Mode::manhattan_sum || p.head_quads == 1)
      return launch_it(chunks, mode, integral_constant<int, 1>());
    if constexpr (decltype(mode)::value != Mode::manhattan_sum) {
      if (p.head_quads == 2) return launch_it(chunks, mode, integral_constant<int, 2>());
      return launch_it(chunks, mode, integral_constant<int, 4>());
    }
  };
  auto by_mode = [&](auto chunks) {
    switch (p.mode) {
      case Mode::dot: return by_quads(chunks, std::integral_constant<Mode, Mode::dot>());
      case Mode::manhattan: return by_quads(chunks, std::integral_constant<Mode, Mode::manhattan>());
      default: return by_quads(chunks, std::integral_constant<Mode, Mode::manhattan_sum>());
    }
  };
  if (p.page.words <= 4) return by_mode(std::integral_constant<int, 1>());
  return by_mode(std::integral_constant<int, 2>());
}

}  // namespace adamas
