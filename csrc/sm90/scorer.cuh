// The scorer of Hopper: products of signatures and queries on the binary tensor cores (score.cuh).
//
// An instruction multiplies (AND, population count) 16 tokens x 128 bits by 8 columns, two per head:
//
//   dot        sum_b w_b * (2 popc(hi & q_b) + popc(lo & q_b)), w = 1 2 4 -8. Columns 2c and 2c+1 of two
//              instructions hold the planes q_0 .. q_3 of head c. The hi plane is multiplied twice, so the
//              accumulator is 2 popc(hi & q_b) + popc(lo & q_b).
//   manhattan  Column 2c of three instructions holds a thermometer plane of head c, column 2c+1 all ones.
#pragma once
#include "sm90/quads.cuh"
#include "sm90/reduce.cuh"

namespace adamas {

// Words per lane of a head quad's encoded queries and chunk of four words: [head quad][plane][chunk][32 lanes].
constexpr int query_planes(Mode mode) { return is_dot(mode) ? 2 : 3; }

// c += popc(a & b): 16 rows x 128 bits by 128 bits x 8 columns.
__device__ __forceinline__ void mma128(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Two products of the same tokens back to back: the second instruction reuses the operands that the first one
// fetched.
__device__ __forceinline__ void mma128(int (&c)[4], int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, uint32_t e) {
  asm volatile(
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%8,%9}, {%10}, {%0,%1,%2,%3};\n"
      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%4,%5,%6,%7}, {%8,%9}, {%11}, {%4,%5,%6,%7};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(e));
}

// A word of a thermometer plane as it is stored.
__device__ __forceinline__ uint32_t thermometer_word(uint32_t plane) { return plane; }

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

}  // namespace adamas
