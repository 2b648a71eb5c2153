// encode: queries to bit planes, and per score head a pivot that leaves few candidates.
//
// The pivot is a value of a sample that is expected to rank a little below the k-th best. It only
// decides how many candidates scan writes; select checks their number and is exact in every case.
#include "scan.cuh"
#include "select.cuh"
#include "signature.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPivotBits = 8, kPivotBins = 1 << kPivotBits;

// log2 of the sampled tokens
int sample_bits(int max_context_len) { return max_context_len <= 65536 ? 10 : 11; }

struct Shared {
  uint32_t* planes;  // as in the workspace
  int32_t* bias;     // [head quads][4]
  uint32_t* bins;    // [warps][kPivotBins]
  float* scores;     // [score heads per KV head][sample]
};

template <int kChunks, Mode kMode>
__device__ void encode_dot(const DecodeParams& p, float (&x)[kChunks * 4], int slot, const Shared& s) {
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
#pragma unroll
  for (int w = 0; w < kChunks * 4; ++w) {
    const float y = rintf(__fmul_rn(x[w], inverse));
    const int q = y == y ? int(fminf(fmaxf(y, -float(kQueryMax)), float(kQueryMax))) : 0;
    total += q;
#pragma unroll
    for (int b = 0; b < kQueryBits; ++b) {
      const uint32_t word = __ballot_sync(kFull, (q >> b) & 1);
      const int plane = slot / 4 * 2 + b / 2, column = 2 * (slot % 4) + b % 2;
      if (lane == 0 && w < p.page.words)
        s.planes[(plane * kChunks + w / 4) * 32 + column * 4 + w % 4] = word;
    }
  }
  total = __reduce_add_sync(kFull, total);
  if (lane == 0) s.bias[slot] = 3 * total;
}

template <int kChunks>
__device__ void encode_manhattan(const DecodeParams& p, float (&x)[kChunks * 4], int slot, const Shared& s) {
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
        s.planes[((slot / 4 * 3 + b) * kChunks + w / 4) * 32 + 2 * (slot % 4) * 4 + w % 4] = word;
    }
  }
  total = __reduce_add_sync(kFull, total);
  if (lane == 0) s.bias[slot] = total;
}

// All query heads of one (row, KV head) into shared memory; ends synchronised.
template <int kChunks, Mode kMode>
__device__ __forceinline__ void encode_queries(const DecodeParams& p, int row, int kv_head, const Shared& s) {
  const int warp = threadIdx.x / 32;
  const int first_head = kv_head * p.group;
  if (kMode == Mode::dot && !p.per_query_head) {
    if (warp == 0) {
      float sum[kChunks * 4] = {};
      for (int h = 0; h < p.group; ++h) {
        float x[kChunks * 4];
        load_vector(x, p.query, row, first_head + h, p.page.words);
        hadamard(x, p.page.head_size, p.norm);
#pragma unroll
        for (int w = 0; w < kChunks * 4; ++w) sum[w] += x[w];
      }
      encode_dot<kChunks, kMode>(p, sum, 0, s);
    }
  } else {
    for (int h = warp; h < p.group; h += kWarps) {
      float x[kChunks * 4];
      load_vector(x, p.query, row, first_head + h, p.page.words);
      hadamard(x, p.page.head_size, p.norm);
      if constexpr (kMode == Mode::dot) encode_dot<kChunks, kMode>(p, x, h, s);
      else encode_manhattan<kChunks>(p, x, h, s);
    }
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

// A score (and, where scores tie, a position in the sample) that about `rank` of the sample reach.
// Excluded tokens are -inf. Tokens above the score count, and those equal to it from `position` on.
__device__ __forceinline__ float find_pivot(const float* scores, int sample_bits, uint32_t rank, uint32_t* bins,
                                            int& position) {
  const int lane = threadIdx.x % 32, sample = 1 << sample_bits;
  float low = INFINITY, high = -INFINITY;
  uint32_t valid = 0;
#pragma unroll 8
  for (int i = lane; i < sample; i += 32) {
    const float x = scores[i];
    high = fmaxf(high, x);
    if (x > -INFINITY) low = fminf(low, x), ++valid;
  }
  low = -warp_max(-low);
  high = warp_max(high);
  valid = __reduce_add_sync(kFull, valid);
  if (valid <= rank) return -INFINITY;
  // One pass over equal steps of the score nearly always does.
  const float scale = high > low ? (kPivotBins - 1) / (high - low) : 0.0f;
  const uint32_t slack = rank / 8 + 1;
  auto bin_of = [&](float x) { return uint32_t(min(int((x - low) * scale), kPivotBins - 1)); };
  const Threshold first = warp_threshold<kPivotBits>(bins, kPivotBits, rank, slack, [&](auto visit) {
#pragma unroll 8
    for (int i = lane; i < sample; i += 32)
      if (scores[i] > -INFINITY) visit(bin_of(scores[i]));
  });
  if (first.excess <= slack) {
    float least = INFINITY;
#pragma unroll 8
    for (int i = lane; i < sample; i += 32)
      if (scores[i] > -INFINITY && bin_of(scores[i]) >= first.value) least = fminf(least, scores[i]);
    position = 0;
    return -warp_max(-least);
  }
  // Many alike: the position in the sample decides among equal scores.
  const uint32_t base = order_key(low);
  const Threshold t = warp_threshold<kPivotBits>(
      bins, 32 - __clz(order_key(high) - base) + sample_bits, rank, slack, [&](auto visit) {
        for (int i = lane; i < sample; i += 32)
          if (scores[i] > -INFINITY) visit(ranked(order_key(scores[i]) - base, i, sample_bits));
      });
  position = int(t.value & (sample - 1));
  return from_order_key(uint32_t(t.value >> sample_bits) + base);
}

template <int kChunks, Mode kMode, int kQuads>
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ DecodeParams p, int sample_bits) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int kPlanes = query_planes(kMode);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x / p.page.num_kv_heads, kv_head = blockIdx.x % p.page.num_kv_heads;
  const int set = blockIdx.x * p.score_heads_per_kv, sample = 1 << sample_bits;
  let_next_start();

  const RowPlan plan(p, row);
  if (threadIdx.x == 0) {
    p.work.arrived[blockIdx.x] = 0;
    if (kv_head == 0 && p.stats && plan.length > 0) {
      auto* stats = reinterpret_cast<unsigned long long*>(p.stats);
      const int attended = plan.sparse ? max(plan.budget, 0) : plan.length - plan.first;
      atomicAdd(stats + (plan.sparse ? 0 : 1), 1ull);
      atomicAdd(stats + 2, (unsigned long long)(plan.length) * p.num_query_heads);
      atomicAdd(stats + 3, (unsigned long long)(attended) * p.num_query_heads);
    }
  }
  if (threadIdx.x < p.score_heads_per_kv) p.work.count[set + threadIdx.x] = 0;
  if (!plan.sparse) return;

  const int plane_words = p.head_quads * kPlanes * kChunks * 32;
  Shared s;
  s.planes = reinterpret_cast<uint32_t*>(memory);
  s.bias = reinterpret_cast<int32_t*>(s.planes + plane_words);
  s.bins = reinterpret_cast<uint32_t*>(s.bias + 4 * kMaxHeadQuads);
  s.scores = reinterpret_cast<float*>(s.bins + kWarps * kPivotBins);
  for (int i = threadIdx.x; i < plane_words; i += kThreads)
    s.planes[i] = kMode != Mode::dot && (i / 4) % 2 ? kFull : 0;
  if (threadIdx.x < 4 * kMaxHeadQuads) s.bias[threadIdx.x] = 0;
  __syncthreads();

  // The pivots come from a sample of token quads, evenly spaced; quads, because neighbours resemble
  // each other.
  const float spread = float(plan.need) * sample / plan.length;
  const uint32_t rank = uint32_t(spread + 6.0f * sqrtf(1.5f * spread) + 3.0f);
  const bool sampled = !p.scores && plan.length >= 2 * sample && rank < sample * 3 / 4 && plan.need > 0;
  const int64_t quads = (plan.length + kQuad - 1) / kQuad;
  auto quad_at = [&](int i) { return int(i * quads >> (sample_bits - 2)); };
  const int steps = sampled ? sample / kQuad / 8 / kWarps : 0;
  QueryFragments<kChunks, kMode, kQuads> query;
  scan_quads<kChunks, kMode, kQuads>(
      p.page, kv_head, p.block_table + row * p.blocks_per_row, plan.length, query, steps,
      [&](int step) { return quad_at((warp * steps + step) * 8 + lane / 4); },
      [&] {  // while the signatures are on their way
        encode_queries<kChunks, kMode>(p, row, kv_head, s);
        query.load(s.planes, s.bias, p.head_quads);
      },
      [&](int step, int token, int q, const float(&score)[4]) {
        const int head = q * 4 + lane % 4;
        if (head >= p.score_heads_per_kv) return;
        float4 kept;
        auto visible = [&](int i) {
          return uint32_t(token + i - p.num_sink_tokens) < uint32_t(plan.middle) ? score[i] : -INFINITY;
        };
        kept.x = visible(0), kept.y = visible(1), kept.z = visible(2), kept.w = visible(3);
        *reinterpret_cast<float4*>(s.scores + head * sample + ((warp * steps + step) * 8 + lane / 4) * 4) = kept;
      });
  for (int i = threadIdx.x; i < plane_words; i += kThreads)
    p.work.planes[int64_t(blockIdx.x) * plane_words + i] = s.planes[i];
  if (threadIdx.x < 4 * p.head_quads)
    p.work.bias[blockIdx.x * 4 * p.head_quads + threadIdx.x] = s.bias[threadIdx.x];
  if (!sampled) {
    if (threadIdx.x < p.score_heads_per_kv) {
      p.work.pivot_score[set + threadIdx.x] = plan.need > 0 ? -INFINITY : INFINITY;
      p.work.pivot_token[set + threadIdx.x] = INT_MAX;
    }
    return;
  }
  __syncthreads();
  for (int head = warp; head < p.score_heads_per_kv; head += kWarps) {
    int token = INT_MAX;
    const float score = find_pivot(s.scores + head * sample, sample_bits, rank, s.bins + warp * kPivotBins, token);
    if (lane == 0) {
      p.work.pivot_score[set + head] = score;
      p.work.pivot_token[set + head] = token == INT_MAX ? token : quad_at(token / kQuad) * kQuad;
    }
  }
}

}  // namespace

void encode(const DecodeParams& p, void* stream) {
  const int bits = sample_bits(p.max_context_len);
  with_scan_types(p, [&](auto chunks, auto mode, auto quads) {
    constexpr int kChunks = decltype(chunks)::value;
    constexpr Mode kMode = decltype(mode)::value;
    const int words = p.head_quads * query_planes(kMode) * kChunks * 32 + 4 * kMaxHeadQuads +
                      kWarps * kPivotBins + (p.score_heads_per_kv << bits);
    launch(encode_kernel<kChunks, kMode, decltype(quads)::value>, dim3(p.num_rows * p.page.num_kv_heads),
           kThreads, words * 4, stream, false, "encode", p, bits);
  });
}

}  // namespace adamas
