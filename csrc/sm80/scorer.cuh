// The scorer of other GPUs than Hopper: products of signatures and queries in 8-bit integers (score.cuh). From sm_100
// on binary products are emulated; these run on the tensor cores of every GPU from sm_80 on.
//
// An instruction multiplies 16 tokens x 32 dimensions by 8 columns. A lane has a word of 32 dimensions, as in the
// binary products, so four instructions take it, and a register of theirs holds every eighth dimension: dimension
// 8j + i in byte j of register i. Codes are widened by masks, mostly without shifts. What a mask leaves is a power of
// two too large, and queries are stored times the power that makes all products of a sum equally large.
//
//   dot        sum(q * code), code 0 .. 3. Column 2c holds head c of an even head quad, 2c+1 that of the odd one that
//              follows, so that one instruction scores eight heads.
//   manhattan  Bits of thermometer planes as 0 and 1, in the columns of the binary products.
#pragma once
#include "sm90/bytes.cuh"
#include "sm90/quads.cuh"
#include "sm90/reduce.cuh"

namespace adamas {

// The same value, which the compiler takes for another one: it would keep what it widens for later, and spill it.
__device__ __forceinline__ uint32_t again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Words per lane of a head quad's encoded queries and chunk of four words: [head quad][chunk][4 heads][4 words][8] of
// four bytes (dot), or [head quad][plane][chunk][32 lanes] of bits (manhattan).
constexpr int query_planes(Mode mode) { return is_dot(mode) ? kByteWords / 2 : 3; }

// Bit i of every byte as 2^i, or 1 for i = 7; and of a thermometer_word() as 2^(6-i), or 64.
__device__ __forceinline__ uint32_t code_bits(uint32_t x, int i) {
  return i < 7 ? x & 0x01010101u << i : x >> 7 & 0x01010101u;
}
__device__ __forceinline__ uint32_t query_bits(uint32_t x, int i) {
  return i < 7 ? x & 0x40404040u >> i : x >> 1 & 0x40404040u;
}

// A word of a thermometer plane as it is stored: bit i of every byte becomes bit 6 - i, and bit 7 stays. A plane of
// ones stays as it is.
__device__ __forceinline__ uint32_t thermometer_word(uint32_t plane) {
  const uint32_t reversed = __byte_perm(__brev(plane), 0, 0x0123);
  return (reversed >> 1 & 0x7f7f7f7fu) | (reversed << 7 & 0x80808080u);
}

// c += 64 popc(a & b): 16 rows x 128 bits by 128 bits x 8 columns.
__device__ __forceinline__ void mma128(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    mma32(c, code_bits(a0, i), code_bits(a1, i), code_bits(a0, i + 1), code_bits(a1, i + 1), query_bits(b, i),
          query_bits(b, i + 1));
}

// The encoded queries of one (row, KV head) as this lane's fragments.
template <int kChunks, Mode kMode, int kQuads>
struct QueryFragments {
  static constexpr bool kDot = is_dot(kMode);
  static constexpr int kTiles = kDot ? (kQuads + 1) / 2 : kQuads;  // of 8 columns
  static constexpr int kWords = kDot ? kByteWords : 3;             // per lane and chunk
  uint32_t plane[kTiles][kWords][kChunks];
  int bias[kQuads];
  HeadWeight weight[kQuads];  // dot_max
  const uint32_t* more = nullptr;  // manhattan_sum: fragments of all head quads but the first
  int num_more = 0;

  // weights: [head quad][4]. Heads past the last one never have the maximum.
  __device__ void load_weights(const HeadWeight* weights, int head_quads) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      weight[q] = q < head_quads ? weights[q * 4 + threadIdx.x % 4] : HeadWeight{0.0f, INFINITY};
  }

  // planes: as query_planes() says; biases: [head quad][4]
  __device__ void load(const uint32_t* planes, const int32_t* biases, int head_quads) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int quad = kDot ? 2 * t + lane / 4 % 2 : t;
#pragma unroll
      for (int i = 0; i < kWords; ++i)
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int at = kDot ? ((quad * kChunks + k) * 16 + lane / 8 * 4 + lane % 4) * kWords + i
                              : ((quad * kWords + i) * kChunks + k) * 32 + lane;
          plane[t][i][k] = quad < head_quads ? planes[at] : 0;
        }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) bias[q] = q < head_quads ? biases[q * 4 + lane % 4] : 0;
    if (kMode == Mode::manhattan_sum) {
      more = planes + kWords * kChunks * 32 + lane;
      num_more = head_quads - 1;
    }
  }
};

// An mma takes two of the four tokens, hence the pairs. Even head quads also get the products of the next one, which
// must be scored after them.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void dot_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                         const QuadWords<kChunks>& s, int q, int (&value)[4],
                                         const OtherProducts& products) {
  if (q % 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = products.other[i] - query.bias[q];
    return;
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    int sum[4] = {0, 0, 0, 0};  // 16 times
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const CodeFields x(again(s.hi[k][2 * pair]), s.lo[k][2 * pair]);
      const CodeFields y(again(s.hi[k][2 * pair + 1]), s.lo[k][2 * pair + 1]);
      const uint32_t(&b)[kByteWords][kChunks] = query.plane[q / 2];
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_field(sum, x, y, n, b[2 * n][k], b[2 * n + 1][k]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value[2 * pair + i] = (sum[2 * i] >> 3) - query.bias[q];
      products.other[2 * pair + i] = sum[2 * i + 1] >> 3;
    }
  }
}

// The planes are multiplied in a loop, so that what one of them is widened to is not kept for other products.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void manhattan_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                               const QuadWords<kChunks>& s, int q, int (&value)[4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    auto add = [&](int(&sum)[4], auto plane) {  // 64 times
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const uint32_t h0 = s.hi[k][2 * pair], h1 = s.hi[k][2 * pair + 1];
        const uint32_t l0 = s.lo[k][2 * pair], l1 = s.lo[k][2 * pair + 1];
#pragma unroll 1
        for (int t = 0; t < 3; ++t)
          mma128(sum, t == 0 ? h0 | l0 : t == 1 ? h0 : h0 & l0, t == 0 ? h1 | l1 : t == 1 ? h1 : h1 & l1, plane(t, k));
      }
    };
    int sum[4] = {0, 0, 0, 0};
    const uint32_t(&b)[3][kChunks] = query.plane[q];
    add(sum, [&](int t, int k) { return t == 0 ? b[0][k] : t == 1 ? b[1][k] : b[2][k]; });
    if constexpr (kMode == Mode::manhattan_sum) {
      for (int m = 0; m < query.num_more; ++m) {
        int extra[4] = {0, 0, 0, 0};
        const uint32_t* from = query.more + m * 3 * kChunks * 32;
        add(extra, [&](int t, int k) { return from[(t * kChunks + k) * 32]; });
        sum[0] += extra[0];
        sum[2] += extra[2];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int x = sum[2 * i] >> 5;
      const int norm = sum[2 * i + 1] >> 6;
      if constexpr (kMode == Mode::manhattan_sum) {  // over the head quad, whose heads are in four neighbouring lanes
        x += __shfl_xor_sync(kFull, x, 1);
        x += __shfl_xor_sync(kFull, x, 2);
        // The low bits of the bias hold the group's size: bias = 32 * sum of |b| + heads.
        value[2 * pair + i] = x - (query.bias[q] & 31) * norm - (query.bias[q] >> 5);
      } else {
        value[2 * pair + i] = x - norm - query.bias[q];
      }
    }
  }
}

}  // namespace adamas
