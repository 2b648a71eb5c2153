// Exact softmax attention of one warp over kChunk tokens at a time. K and V rows are loaded from the page or from
// shared memory as fragments of the tensor cores; the state stays in registers. At the end, the warps of a block
// merge their states through shared memory.
//
// The products are S^T = K Q^T and O^T = V^T P^T: their rows are tokens or dimensions, and their 8 columns are
// query heads. The order of a product's inner dimension is free as long as both operands agree. Every lane
// therefore loads 16 contiguous bytes (8 of fp8): of K, the dimensions 32j + 8c .. + 7 of tokens g and g + 8; of V,
// the dimensions 64h + 8g .. + 7 of tokens 2c, 2c + 1, 2c + 8, 2c + 9 (g = lane / 4, c = lane % 4). P^T needs one
// transposition of 8x8 values per 8 tokens (movmatrix).
#pragma once
#include "sm90/address.cuh"
#include "sm90/mma.cuh"
#include "sm90/rows.cuh"
#include "sm90/softmax.cuh"

namespace adamas {

constexpr int kChunk = 16;  // tokens of one step

// Softmax state of up to 8 * kTiles heads over the tokens that one warp has processed. Lane (g, c) holds heads 2c
// and 2c + 1 of each tile; logits are in base 2.
template <int D, class T, int kTiles, bool kFp8>
struct Attention {
  static constexpr int kRowBytes = D * (kFp8 ? 1 : int(sizeof(T)));
  static constexpr int kKChunks = D / 32, kHalves = D / 64;
  static constexpr bool kTail = D % 64 != 0;  // the last 32 dimensions of D = 96
  static constexpr int kRows = D / 16;
  static constexpr int kFloats = kTiles * (kRows * 4 + 4);  // per lane
  static constexpr int kHeadFloats = D + 4;                 // one head of one warp in shared memory

  bool e5m2 = false;  // fp8 is e5m2, not e4m3
  uint4 query[kTiles][kKChunks];
  float acc[kTiles][kRows][4];
  float top[kTiles][2], sum[kTiles][2];

  // Loads `heads` query heads of a row, from `head` on, and resets the state.
  __device__ void start(const DecodeParams& p, int row, int head, int heads) {
    e5m2 = p.page.element == Element::e5m2;
    load_query(head_vector<const T>(p.query, row, head), p.query.head_stride, heads);
    reset();
  }

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

  // Values of a row in global or shared memory from dimension `first` on, as T.
  template <bool kShared>
  __device__ __forceinline__ uint4 load8_values(const uint8_t* row, int first) const {
    row += first * (kRowBytes / D);
    if constexpr (kFp8) return from_fp8<T>(kShared ? load_shared8(row) : load8_line(row), e5m2);
    else return kShared ? load_shared16(row) : load16_line(row);
  }
  template <bool kShared>
  __device__ __forceinline__ uint2 load4_values(const uint8_t* row, int first) const {
    row += first * (kRowBytes / D);
    if constexpr (kFp8)
      return from_fp8<T>(kShared ? load_shared4(row) : __ldg(reinterpret_cast<const uint32_t*>(row)), e5m2);
    else return kShared ? load_shared8(row) : load8(row);
  }

  // Processes 16 slots of one token each. at(slot) is the address of a slot's K row, in shared memory if kShared; the V
  // row follows after `v_offset` bytes. It must be readable for every slot, but only slots in [begin, end) count.
  template <bool kShared = false, class At>
  __device__ __forceinline__ void step(const DecodeParams& p, At at, int64_t v_offset, int begin, int end) {
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
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] *= p.softmax_scale;
      if (p.soft_cap > 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = soft_cap(s[i], p.soft_cap);
      }
      float decay[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[h] = valid[0] ? s[h] : -INFINITY;
        s[2 + h] = valid[1] ? s[2 + h] : -INFINITY;
        float best = fmaxf(s[h], s[2 + h]);
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 4));
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 8));
        best = fmaxf(best, __shfl_xor_sync(kFull, best, 16));
        best = fmaxf(best, top[n][h]);
        decay[h] = softmax_weight(top[n][h], best);
        top[n][h] = best;
        s[h] = softmax_weight(s[h], best);
        s[2 + h] = softmax_weight(s[2 + h], best);
        sum[n][h] = sum[n][h] * decay[h] + s[h] + s[2 + h];
      }
      // The largest logit rarely changes after the first steps.
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
          add(acc[n][h * 4 + i], word_at(v[0][h], i), word_at(v[1][h], i), word_at(v[2][h], i),
              word_at(v[3][h], i), b0, b1);
      if (kTail) {
        add(acc[n][kHalves * 4], tail[0].x, tail[1].x, tail[2].x, tail[3].x, b0, b1);
        add(acc[n][kHalves * 4 + 1], tail[0].y, tail[1].y, tail[2].y, tail[3].y, b0, b1);
      }
    }
  }

  // Adds two neighbouring dimensions of four tokens: the first one to row g, the second to row g + 8.
  static __device__ __forceinline__ void add(float (&c)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3,
                                             uint32_t b0, uint32_t b1) {
    Mma<T>::run(c, __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                __byte_perm(v2, v3, 0x7632), b0, b1);
  }

  // Attends to the chunk of a context that starts at `token`, restricted to tokens [first, end). Slots outside read the
  // nearest token inside. pages, blocks: head_pages() and row_blocks() (address.cuh).
  __device__ __forceinline__ void attend_chunk(const DecodeParams& p, int first, int end, const uint8_t* pages,
                                               const int32_t* blocks, int token) {
    const uint8_t* run = pages + key_offset<kRowBytes>(p.page, blocks, token);
    const int last = min(kChunk, end - token) - 1, begin = max(first - token, 0);
    step(p, [&](int slot) { return run + min(max(slot, begin), last) * kRowBytes; }, p.page.v_offset, begin, last + 1);
  }

  // After the last step, gives every lane the complete sums.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum[n][h] += __shfl_xor_sync(kFull, sum[n][h], step);
  }

  // Stores a warp's state in global memory as [kFloats][32 lanes]; merge() adds such a state.
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
      MergeScales scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        scale[h] = merge_softmax(top[n][h], sum[n][h], from[(n * 4 + h) * 32], from[(n * 4 + 2 + h) * 32]);
#pragma unroll
      for (int i = 0; i < kRows * 4; ++i)
        acc[n][i / 4][i % 4] = acc[n][i / 4][i % 4] * scale[i & 1].own +
                               from[(kTiles * 4 + n * kRows * 4 + i) * 32] * scale[i & 1].other;
    }
  }

  // This lane's dimension of acc[..][row][0]; that of acc[..][row][2] is one more.
  static __device__ __forceinline__ int dimension(int row) {
    const int g = threadIdx.x % 32 / 4;
    return row < kHalves * 4 ? 64 * (row / 4) + 8 * g + 2 * (row % 4) : 64 * kHalves + 4 * g + 2 * (row % 4);
  }

  // Stores one tile of 8 heads of every warp in shared memory: [warp][head][top, sum, -, -, D values].
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

  // Merges the `warps` warps of a block and writes the output of `heads` query heads of a row, from `first` on. buffer:
  // warps * min(heads, 8) * kHeadFloats floats.
  __device__ __forceinline__ void write_merged(const DecodeParams& p, int warps, float* buffer, int row, int first,
                                               int heads) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int here = min(heads - 8 * n, 8);
      if (here <= 0) break;
      __syncthreads();
      share(buffer, n, here);
      __syncthreads();
      for (int i = threadIdx.x; i < here * D; i += warps * 32) {
        const int local = i / D, d = i % D, head = first + 8 * n + local;
        const SoftmaxValue x = merge_parts(buffer + local * kHeadFloats, warps, here * kHeadFloats, d);
        head_vector<T>(p.output, row, head)[d] = T(softmax_output(p, head, x));
        if (d == 0) store_lse(p, row, head, x.top, x.sum);
      }
    }
  }

  // Merges the warps of a block into the first one's state.
  __device__ __forceinline__ void merge_warps(int warps, float* buffer, int heads) {
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
        for (int w = 1; w < warps; ++w) {
          const float* from = buffer + (w * here + head) * kHeadFloats;
          const MergeScales scale = merge_softmax(top[n][h], sum[n][h], from[0], from[1]);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const float2 x = *reinterpret_cast<const float2*>(from + 4 + dimension(i));
            acc[n][i][h] = acc[n][i][h] * scale.own + x.x * scale.other;
            acc[n][i][2 + h] = acc[n][i][2 + h] * scale.own + x.y * scale.other;
          }
        }
      }
    }
  }
};

}  // namespace adamas
