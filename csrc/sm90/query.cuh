// Encodes queries in the order of the tensor core's fragments (scorer.cuh): 4-bit values (dot) or the thermometer
// planes of 2-bit codes (manhattan).
#pragma once
#include "sm90/maximum.cuh"
#include "sm90/score.cuh"
#include "sm90/signature.cuh"

namespace adamas {

// The encoded queries of one (row, KV head) in shared memory. A block encodes them, one warp per query head. If heads
// share a token set, their sum is encoded instead (dot), or their biases are summed (manhattan_sum).
struct QueryMemory {
  uint32_t* planes;     // as in the workspace
  int32_t* bias;        // [kMaxHeadQuads][4]
  HeadWeight* weights;  // [kMaxHeadQuads][4], for dot_max
  float* scratch;       // [group][words][32], used while encoding
  uint32_t* bytes = nullptr;  // as in the workspace, if they are wanted; in global memory
};

// Stores this lane's dimension of word w for products of 8-bit integers (bytes.cuh), times 16, 4 or 1, as what it is
// multiplied with is the code times 1, 4 or 16.
template <int kChunks>
__device__ __forceinline__ void store_byte(const DecodeParams& p, uint32_t* bytes, int slot, int w, int q) {
  const int lane = threadIdx.x % 32, i = lane % 8;
  const int at = ((slot / 4 * kChunks + w / 4) * 16 + slot % 4 * 4 + w % 4) * kByteWords + i;
  const int factor = i < 2 ? 16 : i < 4 ? 4 : 1;
  if (w < p.page.words) reinterpret_cast<int8_t*>(bytes + at)[lane / 8] = int8_t(q * factor);
}

template <int kChunks, Mode kMode, bool kBytes>
__device__ void encode_dot(const DecodeParams& p, float (&x)[kChunks * 4], int slot, const QueryMemory& s) {
  const int lane = threadIdx.x % 32;
  float top = 0;
  bool odd = false;
#pragma unroll
  for (int w = 0; w < kChunks * 4; ++w) {
    top = fmaxf(top, fabsf(x[w]));
    odd |= x[w] != x[w];
  }
  top = warp_max(top);
  float step = __fdiv_rn(top, float(kQueryMax));
  if (__any_sync(kFull, odd) || !isfinite(step)) step = 0.0f;
  float inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
  if (!isfinite(inverse)) inverse = 0.0f;
  int total = 0;
  constexpr int kWordsPerPass = 32 / kQueryBits;
  uint32_t own = 0;  // of these words, lane l stores bit l % kQueryBits of word l / kQueryBits
  auto store = [&](int first) {
    const int w = first + lane / kQueryBits, b = lane % kQueryBits;
    const int plane = slot / 4 * 2 + b / 2, column = 2 * (slot % 4) + b % 2;
    if (w < p.page.words) s.planes[(plane * kChunks + w / 4) * 32 + column * 4 + w % 4] = own;
  };
#pragma unroll
  for (int w = 0; w < kChunks * 4; ++w) {
    const float y = rintf(__fmul_rn(x[w], inverse));
    const int q = y == y ? int(fminf(fmaxf(y, -float(kQueryMax)), float(kQueryMax))) : 0;
    total += q;
    if constexpr (!kHopper) {
      store_byte<kChunks>(p, s.planes, slot, w, q);
      continue;
    }
    if (kBytes && s.bytes) store_byte<kChunks>(p, s.bytes, slot, w, q);
#pragma unroll
    for (int b = 0; b < kQueryBits; ++b) {
      const uint32_t word = __ballot_sync(kFull, (q >> b) & 1);
      if (lane == w % kWordsPerPass * kQueryBits + b) own = word;
    }
    if (w % kWordsPerPass == kWordsPerPass - 1 || w == kChunks * 4 - 1) store(w / kWordsPerPass * kWordsPerPass);
  }
  total = __reduce_add_sync(kFull, total);
  if (lane == 0) s.bias[slot] = 3 * total;
  if (kMode == Mode::dot_max && lane == 0) s.weights[slot] = {logit_factor(step, p.logit_scale), 0.0f};
}

template <int kChunks>
__device__ void encode_manhattan(const DecodeParams& p, float (&x)[kChunks * 4], int slot, const QueryMemory& s) {
  const int lane = threadIdx.x % 32;
  const float t = outer_threshold(x, p.coding, p.page.head_size);
  int total = 0;
#pragma unroll
  for (int w = 0; w < kChunks * 4; ++w) {
    if (w >= p.page.words) break;
    const int code = bucketize(x[w], t);
    total += code;
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      const uint32_t word = __ballot_sync(kFull, code > b);
      if (lane == 0)
        s.planes[((slot / 4 * 3 + b) * kChunks + w / 4) * 32 + 2 * (slot % 4) * 4 + w % 4] = thermometer_word(word);
    }
  }
  total = __reduce_add_sync(kFull, total);
  if (lane == 0) s.bias[slot] = total;
}

// Initialises the planes before queries are encoded; the caller synchronises.
template <int kChunks, Mode kMode>
__device__ __forceinline__ void clear_queries(const DecodeParams& p, const QueryMemory& s) {
  const int words = p.head_quads * query_planes(kMode) * kChunks * 32;
  for (int i = threadIdx.x; i < words; i += blockDim.x)
    s.planes[i] = !is_dot(kMode) && i / 4 % 2 && i / 32 % kChunks * 4 + i % 4 < p.page.words ? kFull : 0;
  if (threadIdx.x < 4 * kMaxHeadQuads) s.bias[threadIdx.x] = 0;
  if (kMode == Mode::dot_max && threadIdx.x < 4 * kMaxHeadQuads) s.weights[threadIdx.x] = {0.0f, INFINITY};
}

// Encodes all query heads of one (row, KV head); warp h < group holds head h in x. kBytes: s.bytes may be
// wanted. Ends synchronised.
template <int kChunks, Mode kMode, bool kBytes = false>
__device__ __forceinline__ void encode_queries(const DecodeParams& p, float (&x)[kChunks * 4], const QueryMemory& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < p.group) hadamard(x, p.page.head_size, p.norm);
  if (kMode == Mode::dot && !p.per_query_head) {
    float* rows = s.scratch;
    if (warp < p.group) {
#pragma unroll
      for (int w = 0; w < kChunks * 4; ++w) rows[(warp * kChunks * 4 + w) * 32 + lane] = x[w];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 0; w < kChunks * 4; ++w) x[w] = 0;
      for (int h = 0; h < p.group; ++h)
#pragma unroll
        for (int w = 0; w < kChunks * 4; ++w) x[w] += rows[(h * kChunks * 4 + w) * 32 + lane];
      encode_dot<kChunks, kMode, false>(p, x, 0, s);
    }
  } else if (warp < p.group) {
    if constexpr (is_dot(kMode)) encode_dot<kChunks, kMode, kBytes>(p, x, warp, s);
    else encode_manhattan<kChunks>(p, x, warp, s);
  }
  __syncthreads();
  if constexpr (kMode == Mode::manhattan_sum) {  // score_quad() unpacks it
    if (threadIdx.x == 0) {
      int total = 0;
      for (int h = 0; h < p.group; ++h) total += s.bias[h];
      for (int c = 0; c < 4; ++c) s.bias[c] = total * 32 + p.group;
    }
    __syncthreads();
  }
}

}  // namespace adamas
