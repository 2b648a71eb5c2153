// encode: queries to bit planes, and per score head a pivot that leaves few candidates.
//
// The pivot is a value of a sample that is expected to rank a little below the k-th best. It only
// decides how many candidates scan writes; select checks their number and is exact in every case.
#include <algorithm>

#include "encode.cuh"
#include "select.cuh"

namespace adamas {
namespace {

constexpr int kMostThreads = 512;

constexpr int kPivotBits = 8, kPivotBins = 1 << kPivotBits, kPivotWords = spread(kPivotBins);

// log2 of the sampled tokens
int sample_bits(int max_context_len) { return max_context_len <= 65536 ? 10 : max_context_len <= 1 << 18 ? 11 : 12; }

// A score (and, where scores tie, a position in the sample) that about `rank` of the sample reach, by
// one warp. Excluded tokens are -inf. Tokens above the score count, and those equal to it from
// `position` on. `bins`: the scores in equal steps from low to high.
__device__ __forceinline__ float find_pivot(const float* scores, int sample_bits, uint32_t rank, float low,
                                            float high, uint32_t* bins, int& position) {
  const int lane = threadIdx.x % 32, sample = 1 << sample_bits;
  const uint32_t slack = rank;  // more candidates are no harm, as long as they fit
  const Bin first = find_bin<kPivotBits>(bins, rank);
  if (first.size == 0) return -INFINITY;  // fewer tokens than that
  if (first.before + first.size - rank <= slack) {
    position = 0;
    return low + first.index * ((high - low) / (kPivotBins - 1));
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

// So few registers that a block of scan fits beside two blocks: it fetches its first stages meanwhile.
constexpr int most_registers(int quads) { return quads == 4 ? 128 : 80; }

template <int kChunks, Mode kMode, int kQuads>
__global__ void __maxnreg__(most_registers(kQuads)) encode_kernel(const __grid_constant__ DecodeParams p, int sample_bits) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int kPlanes = query_planes(kMode);
  const int threads = blockDim.x, warps = threads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x / p.page.num_kv_heads, kv_head = blockIdx.x % p.page.num_kv_heads;
  const int set = blockIdx.x * p.score_heads_per_kv, sample = 1 << sample_bits;
  // Scan fetches signatures ahead as soon as it may start, so what is in front of the step comes first.
  wait_for_previous();
  let_next_start();

  // One warp per query head of the group.
  float x[kChunks * 4];
  if (warp < p.group) load_vector(x, p.query, row, kv_head * p.group + warp, p.page.words);
  const RowPlan plan(p, row);
  if (threadIdx.x == 0) {
    p.work.arrived[blockIdx.x] = 0;
    if (blockIdx.x == 0) *p.work.pieces = 0;
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
  QueryMemory s;
  s.planes = reinterpret_cast<uint32_t*>(memory);
  s.bias = reinterpret_cast<int32_t*>(s.planes + plane_words);
  uint32_t* bins = reinterpret_cast<uint32_t*>(s.bias + 4 * kMaxHeadQuads);  // [score head][kPivotWords]
  uint32_t* range = bins + p.score_heads_per_kv * kPivotWords;
  float* scores = s.scratch = reinterpret_cast<float*>(range + 4 * kMaxHeadQuads * 2);  // [score head][sample]
  for (int i = threadIdx.x; i < p.score_heads_per_kv * kPivotWords; i += threads) bins[i] = 0;
  if (threadIdx.x < 4 * kMaxHeadQuads * 2) range[threadIdx.x] = 0;
  clear_queries<kChunks, kMode>(p, s);
  __syncthreads();

  // The pivots come from a sample of tiles, evenly spaced.
  const float expected = float(plan.need) * sample / plan.length;
  const uint32_t rank = uint32_t(expected + 6.0f * sqrtf(1.5f * expected) + 3.0f);
  const bool sampled = !p.scores && plan.length >= 2 * sample && rank < sample * 3 / 4 && plan.need > 0;
  const int64_t tiles = (plan.length + kTile - 1) / kTile;
  auto quad_at = [&](int i) { return int((i / 4 * tiles >> (sample_bits - 4)) * 4 + i % 4); };
  const int steps = sampled ? sample / kQuad / 8 / warps : 0;
  QueryFragments<kChunks, kMode, kQuads> query;
  float low[kQuads], high[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) low[q] = INFINITY, high[q] = -INFINITY;
  scan_quads<kChunks, kMode, kQuads>(
      p.page, kv_head, p.block_table + row * p.blocks_per_row, plan.length, query, steps,
      [&](int step) { return quad_at((warp * steps + step) * 8 + lane / 4); },
      [&] { // while the signatures are on their way
        encode_queries<kChunks, kMode>(p, x, s);
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
        high[q] = fmaxf(fmaxf(high[q], fmaxf(kept.x, kept.y)), fmaxf(kept.z, kept.w));
        auto finite = [](float x) { return x > -INFINITY ? x : INFINITY; };
        low[q] = fminf(fminf(low[q], fminf(finite(kept.x), finite(kept.y))), fminf(finite(kept.z), finite(kept.w)));
        *reinterpret_cast<float4*>(scores + head * sample + ((warp * steps + step) * 8 + lane / 4) * 4) = kept;
      });
  for (int i = threadIdx.x; i < plane_words; i += threads)
    p.work.planes[int64_t(blockIdx.x) * plane_words + i] = s.planes[i];
  if (threadIdx.x < 4 * p.head_quads)
    p.work.bias[blockIdx.x * 4 * p.head_quads + threadIdx.x] = s.bias[threadIdx.x];
  if (!sampled) {
    if (threadIdx.x < p.score_heads_per_kv) {
      p.work.pivot_score[set + threadIdx.x] = plan.need > 0 ? -INFINITY : INFINITY;
      p.work.pivot_token[set + threadIdx.x] = INT_MAX;
      p.work.pivot_scale[set + threadIdx.x] = 0.0f;
    }
    return;
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int head = q * 4 + lane % 4;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      low[q] = fminf(low[q], __shfl_xor_sync(kFull, low[q], step));
      high[q] = fmaxf(high[q], __shfl_xor_sync(kFull, high[q], step));
    }
    if (lane < 4 && head < p.score_heads_per_kv && low[q] < INFINITY) {
      atomicMax(range + 2 * head, order_key(-low[q]));
      atomicMax(range + 2 * head + 1, order_key(high[q]));
    }
  }
  __syncthreads();
  // Every lane counts the scores that it wrote.
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int head = q * 4 + lane % 4;
    if (head >= p.score_heads_per_kv) continue;
    const float base = -from_order_key(range[2 * head]), top = from_order_key(range[2 * head + 1]);
    const float scale = top > base ? __fdividef(kPivotBins - 1, top - base) : 0.0f;
    auto count = [&](float x) {
      if (x > -INFINITY) atomicAdd(bins + head * kPivotWords + spread(min(int((x - base) * scale), kPivotBins - 1)), 1u);
    };
    for (int step = 0; step < steps; ++step) {
      const float4 x = *reinterpret_cast<float4*>(scores + head * sample + ((warp * steps + step) * 8 + lane / 4) * 4);
      count(x.x), count(x.y), count(x.z), count(x.w);
    }
  }
  __syncthreads();
  for (int head = warp; head < p.score_heads_per_kv; head += warps) {
    const float base = -from_order_key(range[2 * head]), top = from_order_key(range[2 * head + 1]);
    int token = INT_MAX;
    const float score = find_pivot(scores + head * sample, sample_bits, rank, base, top,
                                   bins + head * kPivotWords, token);
    if (lane == 0) {
      p.work.pivot_score[set + head] = score;
      p.work.pivot_token[set + head] = token == INT_MAX ? token : quad_at(token / kQuad) * kQuad;
      // The k best lie between the pivot and a little above the best of the sample.
      p.work.pivot_scale[set + head] = score > -INFINITY && top > score ? (kBins - 1) / (top - score) : 0.0f;
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
                      p.score_heads_per_kv * kPivotWords + 4 * kMaxHeadQuads * 2 +
                      std::max(p.score_heads_per_kv << bits, p.group * kChunks * 4 * 32);
    // Large blocks are quicker, small ones share a processor.
    const int groups = p.num_rows * p.page.num_kv_heads;
    const int threads = groups <= num_multiprocessors() || p.group > 8 ? kMostThreads : kMostThreads / 2;
    launch(encode_kernel<kChunks, kMode, decltype(quads)::value>, dim3(groups), threads, words * 4, stream, true, "encode", p, bits);
  });
}

}  // namespace adamas
