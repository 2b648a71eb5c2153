// Scores of tokens from their signatures on the binary tensor cores, by one warp.
//
// An instruction multiplies (AND, population count) 16 tokens x 128 bits by 8 columns. With head quads of four heads,
// a lane (row = lane / 4, c = lane % 4) gets the complete score of head c for its own four tokens, without any
// exchange between lanes:
//
//   dot        q.level = sum_b w_b * (4 popc(hi & q_b) + 2 popc(lo & q_b)) - 3 sum(q), w = 1 2 4 -8.
//              Columns 2c and 2c+1 of two instructions hold the planes q_0 .. q_3 of head c. The hi
//              plane is multiplied twice, so the accumulator is 2 popc(hi & q_b) + popc(lo & q_b).
//   manhattan  |a - b|_1 = |a|_1 + |b|_1 - 2 popc(a AND b) over the thermometer planes hi|lo, hi,
//              hi&lo. Column 2c holds head c, column 2c+1 all ones, which yields |a|_1.
//
// A 16-byte load yields one word of four tokens, so a lane loads exactly its own token quad.
#pragma once
#include "sm90/mma.cuh"
#include "sm90/params.h"
#include "sm90/reduce.cuh"

namespace adamas {

constexpr int query_planes(Mode mode) { return is_dot(mode) ? 2 : 3; }

// The encoded queries of one (row, KV head) as this lane's fragments.
template <int kChunks, Mode kMode, int kQuads>
struct QueryFragments {
  static constexpr int kPlanes = query_planes(kMode);
  uint32_t plane[kQuads][kPlanes][kChunks];
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

// Signature words of one token quad: word c (and c + 4) of both planes, and the four scales. Lanes whose word is past
// the head size load word 0; their query planes are zero.
template <int kChunks, Mode kMode>
struct Signatures {
  uint4 hi[kChunks], lo[kChunks];
  uint2 scale;
};

// A lane's four tokens as words: token i has hi[k][i] and lo[k][i].
template <int kChunks>
struct QuadWords {
  uint32_t hi[kChunks][4], lo[kChunks][4];

  template <Mode kMode>
  __device__ __forceinline__ explicit QuadWords(const Signatures<kChunks, kMode>& s) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      hi[k][0] = s.hi[k].x, hi[k][1] = s.hi[k].y, hi[k][2] = s.hi[k].z, hi[k][3] = s.hi[k].w;
      lo[k][0] = s.lo[k].x, lo[k][1] = s.lo[k].y, lo[k][2] = s.lo[k].z, lo[k][3] = s.lo[k].w;
    }
  }
};

// An mma takes two of the four tokens, hence the pairs.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void dot_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                         const QuadWords<kChunks>& s, int q, int (&value)[4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const uint32_t h0 = s.hi[k][2 * pair], h1 = s.hi[k][2 * pair + 1];
      const uint32_t l0 = s.lo[k][2 * pair], l1 = s.lo[k][2 * pair + 1];
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
}

template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void manhattan_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                               const QuadWords<kChunks>& s, int q, int (&value)[4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    int sum[4] = {0, 0, 0, 0};
    uint32_t any[kChunks][2], both[kChunks][2];
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        any[k][i] = s.hi[k][2 * pair + i] | s.lo[k][2 * pair + i];
        both[k][i] = s.hi[k][2 * pair + i] & s.lo[k][2 * pair + i];
      }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const uint32_t(&b)[3][kChunks] = query.plane[q];
      mma128(sum, any[k][0], any[k][1], b[0][k]);
      mma128(sum, s.hi[k][2 * pair], s.hi[k][2 * pair + 1], b[1][k]);
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
          mma128(extra, s.hi[k][2 * pair], s.hi[k][2 * pair + 1], b1);
          mma128(extra, both[k][0], both[k][1], b2);
        }
        sum[0] += extra[0];
        sum[2] += extra[2];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int x = 2 * sum[2 * i];  // summed over the head quad, whose heads are in four neighbouring lanes
        x += __shfl_xor_sync(kFull, x, 1);
        x += __shfl_xor_sync(kFull, x, 2);
        // The low bits of the bias hold the group's size: bias = 32 * sum of |b| + heads.
        value[2 * pair + i] = x - (query.bias[q] & 31) * norm[i] - (query.bias[q] >> 5);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) value[2 * pair + i] = 2 * sum[2 * i] - norm[i] - query.bias[q];
    }
  }
}

// The scores of a lane's four tokens for head lane % 4 of head quad q. The product with a token's scale is rounded
// separately (no FMA), so that every kernel computes the same score.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                           const Signatures<kChunks, kMode>& s, int q, float (&score)[4]) {
  const QuadWords<kChunks> words(s);
  int value[4];
  if constexpr (is_dot(kMode)) {
    dot_quad(query, words, q, value);
    const float2 s01 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.x));
    const float2 s23 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.y));
    score[0] = __fmul_rn(float(value[0]), s01.x);
    score[1] = __fmul_rn(float(value[1]), s01.y);
    score[2] = __fmul_rn(float(value[2]), s23.x);
    score[3] = __fmul_rn(float(value[3]), s23.y);
  } else {
    manhattan_quad(query, words, q, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = float(value[i]);
  }
}

// The logits of a lane's four tokens (dot_max), with the head's log-sum-exp not yet subtracted.
template <int kChunks, int kQuads>
__device__ __forceinline__ void logit_quad(const QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                           const Signatures<kChunks, Mode::dot_max>& s, int q, float (&logit)[4]) {
  score_quad(query, s, q, logit);
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] = __fmul_rn(logit[i], query.weight[q].factor);
}

// How the scores of token sets are divided among the lanes of a warp that scores 32 tokens at a time: a lane has
// kScores neighbouring tokens, from the quad's kFirst-th on, of set quad_set(q) for each of kSetQuads q; kSetLanes lanes
// have scores of the same set, and lanes that are kSetStride apart.
template <Mode kMode, int kQuads>
struct SetScores {
  static constexpr bool kOne = kMode == Mode::dot_max;  // one set, whose scores four lanes compute together
  static constexpr int kSetQuads = kOne ? 1 : kQuads, kScores = kOne ? 1 : kQuad;
  static constexpr int kSetStride = kOne ? 1 : 4, kSetLanes = 32 / kSetStride;
  static __device__ __forceinline__ int first() { return kOne ? threadIdx.x % 4 : 0; }
  static __device__ __forceinline__ int set(int q) { return kOne ? 0 : q * 4 + threadIdx.x % 4; }
};

// The maximum over the heads of a group, whose lanes hold one head of each quad. Four neighbouring lanes have the same four
// tokens; lane c of them gets the maximum of token c.
template <int kQuads>
__device__ __forceinline__ float maximum_of_heads(const float (&x)[kQuads][4]) {
  float best[4] = {x[0][0], x[0][1], x[0][2], x[0][3]};
#pragma unroll
  for (int h = 1; h < kQuads; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = fmaxf(best[i], x[h][i]);
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  const float even_token = fmaxf(upper ? best[2] : best[0], __shfl_xor_sync(kFull, upper ? best[0] : best[2], 2));
  const float odd_token = fmaxf(upper ? best[3] : best[1], __shfl_xor_sync(kFull, upper ? best[1] : best[3], 2));
  return fmaxf(odd ? odd_token : even_token, __shfl_xor_sync(kFull, odd ? even_token : odd_token, 1));
}

// The same of the heads' logits less their log-sum-exp.
template <int kChunks, int kQuads>
__device__ __forceinline__ float weighed_maximum(const QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                                 float (&logit)[kQuads][4]) {
#pragma unroll
  for (int h = 0; h < kQuads; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) logit[h][i] = __fsub_rn(logit[h][i], query.weight[h].log_sum);
  return maximum_of_heads(logit);
}

template <int kChunks, Mode kMode, int kQuads, int kScores>
__device__ __forceinline__ void score_set(const QueryFragments<kChunks, kMode, kQuads>& query,
                                          const Signatures<kChunks, kMode>& s, int q, float (&score)[kScores]) {
  static_assert(kScores == SetScores<kMode, kQuads>::kScores);
  if constexpr (kMode == Mode::dot_max) {
    float logit[kQuads][4];
#pragma unroll
    for (int h = 0; h < kQuads; ++h) logit_quad(query, s, h, logit[h]);
    score[0] = weighed_maximum(query, logit);
  } else {
    score_quad(query, s, q, score);
  }
}

}  // namespace adamas
