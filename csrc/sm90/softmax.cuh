// Exact softmax attention of one warp, 16 tokens at a time, from the page or from rows in shared memory into
// the fragments of the tensor core.
//
// Both products have the tokens or the dimensions as rows and the query heads as the 8 columns:
// S^T = K Q^T and O^T = V^T P^T. The order of a product's inner dimension is free as long as both
// operands agree, so every lane loads 16 contiguous bytes: of K, the dimensions 32j + 8c .. + 7 of
// tokens g and g + 8; of V, the dimensions 64h + 8g .. + 7 of tokens 2c, 2c + 1, 2c + 8, 2c + 9
// (g = lane / 4, c = lane % 4). P^T needs one transposition of 8x8 values per 8 tokens (movmatrix).
#pragma once
#include "sm90/common.cuh"

namespace adamas {

template <class T>
struct Mma;

template <>
struct Mma<__nv_bfloat16> {
  static __device__ __forceinline__ void run(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static __device__ __forceinline__ uint32_t from_half2(uint32_t x) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&x));
    return pack(f.x, f.y);
  }
};

template <>
struct Mma<__half> {
  static __device__ __forceinline__ void run(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static __device__ __forceinline__ uint32_t from_half2(uint32_t x) { return x; }
};

__device__ __forceinline__ uint32_t transpose8(uint32_t x) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// 4 fp8 values as T; every fp8 value is one of fp16 and of bf16. An e5m2 value is the upper byte of its
// fp16.
template <class T>
__device__ __forceinline__ uint2 from_fp8(uint32_t x, bool e5m2) {
  uint32_t low, high;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
      : "=r"(low), "=r"(high)
      : "r"(x));
  if (e5m2) low = __byte_perm(x, 0, 0x1404), high = __byte_perm(x, 0, 0x3424);
  return {Mma<T>::from_half2(low), Mma<T>::from_half2(high)};
}

template <class T>
__device__ __forceinline__ uint4 from_fp8(uint2 x, bool e5m2) {
  const uint2 low = from_fp8<T>(x.x, e5m2), high = from_fp8<T>(x.y, e5m2);
  return {low.x, low.y, high.x, high.y};
}

// Softmax state of up to 8 * kTiles heads over the tokens that one warp has seen. Lane (g, c) holds
// heads 2c and 2c + 1 of each tile; logits are in base 2.
template <int D, class T, int kTiles, bool kFp8>
struct Attention {
  static constexpr int kRowBytes = D * (kFp8 ? 1 : int(sizeof(T)));
  static constexpr int kKChunks = D / 32, kHalves = D / 64;
  static constexpr bool kTail = D % 64 != 0;  // the last 32 dimensions of D = 96
  static constexpr int kRows = D / 16;
  static constexpr int kFloats = kTiles * (kRows * 4 + 4);  // per lane
  static constexpr int kHeadFloats = D + 4;                 // one head of one warp in shared memory

  bool e5m2 = false;  // the kind of fp8
  uint4 query[kTiles][kKChunks];
  float acc[kTiles][kRows][4];
  float top[kTiles][2], sum[kTiles][2];

  __device__ void load_query(const T* first_head, int64_t head_stride, int heads) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int head = 8 * n + lane / 4;
#pragma unroll
      for (int j = 0; j < kKChunks; ++j)
        query[n][j] = head < heads ? load16(first_head + head * head_stride + 32 * j + lane % 4 * 8) : uint4{};
    }
  }

  __device__ void reset() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      top[n][0] = top[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) acc[n][i][0] = acc[n][i][1] = acc[n][i][2] = acc[n][i][3] = 0;
    }
  }

  // Values of a row in global or shared memory, from `first` on, as T.
  template <bool kShared>
  __device__ __forceinline__ uint4 load8_values(const uint8_t* row, int first) const {
    row += first * (kRowBytes / D);
    if constexpr (kFp8) return from_fp8<T>(kShared ? shared8(row) : load8_line(row), e5m2);
    else return kShared ? shared16(row) : load16_line(row);
  }
  template <bool kShared>
  __device__ __forceinline__ uint2 load4_values(const uint8_t* row, int first) const {
    row += first * (kRowBytes / D);
    if constexpr (kFp8) return from_fp8<T>(kShared ? shared4(row) : __ldg(reinterpret_cast<const uint32_t*>(row)), e5m2);
    else return kShared ? shared8(row) : load8(row);
  }

  // Tokens of the step are slots 0 .. 15; at(slot) is the address of the slot's K row, readable for
  // every slot, in shared memory if kShared. Only slots in [begin, end) count.
  template <bool kShared = false, class At>
  __device__ __forceinline__ void step(At at, int64_t v_offset, int begin, int end, float scale) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    uint4 k[2][kKChunks];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* from = at(g + 8 * i);
#pragma unroll
      for (int j = 0; j < kKChunks; ++j) k[i][j] = load8_values<kShared>(from, 32 * j + 8 * c);
    }
    uint4 v[4][kHalves];
    uint2 tail[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = at(2 * c + (i & 1) + (i & 2) * 4) + v_offset;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) v[i][h] = load8_values<kShared>(from, 64 * h + 8 * g);
      if (kTail) tail[i] = load4_values<kShared>(from, 64 * kHalves + 4 * g);
    }
    const bool valid[2] = {g >= begin && g < end, g + 8 >= begin && g + 8 < end};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float s[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kKChunks; ++j) {
        Mma<T>::run(s, k[0][j].x, k[1][j].x, k[0][j].y, k[1][j].y, query[n][j].x, query[n][j].y);
        Mma<T>::run(s, k[0][j].z, k[1][j].z, k[0][j].w, k[1][j].w, query[n][j].z, query[n][j].w);
      }
      float decay[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[h] = valid[0] ? s[h] * scale : -INFINITY;
        s[2 + h] = valid[1] ? s[2 + h] * scale : -INFINITY;
        float best = fmaxf(s[h], s[2 + h]);
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 4));
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 8));
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 16));
        best = fmaxf(best, top[n][h]);
        const float base = best == -INFINITY ? 0.0f : best;
        decay[h] = exp2f(top[n][h] - base);
        top[n][h] = best;
        s[h] = exp2f(s[h] - base);
        s[2 + h] = exp2f(s[2 + h] - base);
        sum[n][h] = sum[n][h] * decay[h] + s[h] + s[2 + h];
      }
      if (__any_sync(kFull, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[n][i][e] *= decay[e & 1];
      }
      const uint32_t b0 = transpose8(Mma<T>::pack(s[0], s[1])), b1 = transpose8(Mma<T>::pack(s[2], s[3]));
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          add(acc[n][h * 4 + i], word_of(v[0][h], i), word_of(v[1][h], i), word_of(v[2][h], i),
              word_of(v[3][h], i), b0, b1);
      if (kTail) {
        add(acc[n][kHalves * 4], tail[0].x, tail[1].x, tail[2].x, tail[3].x, b0, b1);
        add(acc[n][kHalves * 4 + 1], tail[0].y, tail[1].y, tail[2].y, tail[3].y, b0, b1);
      }
    }
  }

  // Two neighbouring dimensions of four tokens: row g takes the first one, row g + 8 the second.
  static __device__ __forceinline__ void add(float (&c)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3,
                                             uint32_t b0, uint32_t b1) {
    Mma<T>::run(c, __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                __byte_perm(v2, v3, 0x7632), b0, b1);
  }

  // After the last step: every lane gets the whole sums.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum[n][h] += __shfl_xor_sync(kFull, sum[n][h], step);
  }

  // State to and from memory, [kFloats][32 lanes].
  __device__ void store(float* to) const {
    to += threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        to[(n * 4 + h) * 32] = top[n][h];
        to[(n * 4 + 2 + h) * 32] = sum[n][h];
      }
#pragma unroll
      for (int i = 0; i < kRows * 4; ++i) to[(kTiles * 4 + n * kRows * 4 + i) * 32] = acc[n][i / 4][i % 4];
    }
  }

  __device__ void merge(const float* from) {
    from += threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float own[2], other[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float t = from[(n * 4 + h) * 32], best = fmaxf(t, top[n][h]);
        const float base = best == -INFINITY ? 0.0f : best;
        own[h] = exp2f(top[n][h] - base);
        other[h] = exp2f(t - base);
        sum[n][h] = sum[n][h] * own[h] + from[(n * 4 + 2 + h) * 32] * other[h];
        top[n][h] = best;
      }
#pragma unroll
      for (int i = 0; i < kRows * 4; ++i)
        acc[n][i / 4][i % 4] = acc[n][i / 4][i % 4] * own[i & 1] +
                               from[(kTiles * 4 + n * kRows * 4 + i) * 32] * other[i & 1];
    }
  }

  // Dimension of acc[..][row][0] (and, plus one, of [2]) in this lane.
  static __device__ __forceinline__ int dimension(int row) {
    const int g = threadIdx.x % 32 / 4;
    return row < kHalves * 4 ? 64 * (row / 4) + 8 * g + 2 * (row % 4) : 64 * kHalves + 4 * g + 2 * (row % 4);
  }

  // One tile of 8 heads of every warp to shared memory: [warp][head][top, sum, -, -, D values].
  __device__ void share(float* buffer, int tile, int heads) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n != tile) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = lane % 4 * 2 + h;
        if (head >= heads) continue;
        float* to = buffer + (warp * heads + head) * kHeadFloats;
        if (lane < 4) to[0] = top[n][h], to[1] = sum[n][h];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          *reinterpret_cast<float2*>(to + 4 + dimension(i)) = make_float2(acc[n][i][h], acc[n][i][2 + h]);
      }
    }
  }

  // Adds one head's values over the warps: visit(head, dimension, value, sum) by every thread.
  template <int kWarps, class Visit>
  static __device__ void over_warps(const float* buffer, int heads, Visit visit) {
    for (int i = threadIdx.x; i < heads * D; i += kWarps * 32) {
      const int head = i / D, d = i % D;
      const float* from = buffer + head * kHeadFloats;
      float best = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) best = fmaxf(best, from[w * heads * kHeadFloats]);
      const float base = best == -INFINITY ? 0.0f : best;
      float value = 0, total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* at = from + w * heads * kHeadFloats;
        const float weight = exp2f(at[0] - base);
        value += weight * at[4 + d];
        total += weight * at[1];
      }
      visit(head, d, value, total);
    }
  }

  // The output of all warps together. buffer: kWarps * min(heads, 8) * kHeadFloats.
  template <int kWarps>
  __device__ void write_merged(float* buffer, T* first_head, int64_t head_stride, int heads, float v_scale) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int here = min(heads - 8 * n, 8);
      if (here <= 0) break;
      __syncthreads();
      share(buffer, n, here);
      __syncthreads();
      over_warps<kWarps>(buffer, here, [&](int head, int d, float value, float total) {
        first_head[(8 * n + head) * head_stride + d] = T(total == 0 ? 0.0f : value / total * v_scale);
      });
    }
  }

  // The state of all warps together, into the first warp's.
  template <int kWarps>
  __device__ void merge_warps(float* buffer, int heads) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int here = min(heads - 8 * n, 8);
      if (here <= 0) break;
      __syncthreads();
      share(buffer, n, here);
      __syncthreads();
      if (threadIdx.x >= 32) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = lane % 4 * 2 + h;
        if (head >= here) continue;
        for (int w = 1; w < kWarps; ++w) {
          const float* from = buffer + (w * here + head) * kHeadFloats;
          const float best = fmaxf(from[0], top[n][h]), base = best == -INFINITY ? 0.0f : best;
          const float own = exp2f(top[n][h] - base), other = exp2f(from[0] - base);
          sum[n][h] = sum[n][h] * own + from[1] * other;
          top[n][h] = best;
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const float2 x = *reinterpret_cast<const float2*>(from + 4 + dimension(i));
            acc[n][i][h] = acc[n][i][h] * own + x.x * other;
            acc[n][i][2 + h] = acc[n][i][2 + h] * own + x.y * other;
          }
        }
      }
    }
  }
};

}  // namespace adamas
