// encode: queries to bit planes, and per score head a pivot that leaves few candidates.
//
// The pivot is a score that ranks well below the expected k-th best in a sample. It only decides how many
// candidates scan writes; attend checks their number and is exact in every case.
#include <algorithm>

#include "sm90/query.cuh"
#include "sm90/select.cuh"

namespace adamas {
namespace {

constexpr int kMostThreads = 512;

constexpr int kPivotBits = 8, kPivotWords = spread(1 << kPivotBits);
constexpr int kTries = 8;  // to find a pivot by its value

// Standard deviations above the mean of a normal distribution beyond which the share `p` < 0.5 lies, within
// 0.005 (Abramowitz and Stegun, 26.2.22).
__device__ __forceinline__ float normal_tail(float p) {
  const float t = sqrtf(-2.0f * __logf(p));
  return t - __fdividef(2.30753f + 0.27061f * t, 1.0f + 0.99229f * t + 0.04481f * t * t);
}

struct Pivot {
  float score, top;  // top: the best of the sample
  int position;      // in the sample: tokens above the score count, and those equal to it from here on
};

// Shows a warp the scores of a sample.
template <class Visit>
__device__ __forceinline__ void each_score(const float* scores, int sample_bits, Visit visit) {
#pragma unroll 4
  for (int i = threadIdx.x % 32 * 4; i < 1 << sample_bits; i += 128) {
    const float4 x = *reinterpret_cast<const float4*>(scores + i);
    visit(x.x, i), visit(x.y, i + 1), visit(x.z, i + 2), visit(x.w, i + 3);
  }
}

// Many alike: the position in the sample decides among equal scores.
__device__ __noinline__ uint64_t find_tied_pivot(const float* scores, int sample_bits, int rank, int slack,
                                                 uint32_t* bins) {
  return warp_threshold<kPivotBits>(bins, 32 + sample_bits, rank, slack, [&](auto visit) {
    each_score(scores, sample_bits, [&](float x, int i) {
      if (x > -INFINITY) visit(ranked(order_key(x), i, sample_bits));
    });
  });
}

// A score that `rank` of the sample reach, and at most half as many again (or twice as many where scores
// tie), by one warp. Excluded tokens are -inf. Scores are nearly normal, so the first guess mostly serves;
// otherwise it is corrected, then bisected.
__device__ __forceinline__ Pivot find_pivot(const float* scores, int sample_bits, int rank, uint32_t* bins) {
  const int slack = rank / 2;  // more candidates are no harm, as long as they fit
  float sum = 0, squares = 0, low = INFINITY, high = -INFINITY;
  int seen = 0;
  each_score(scores, sample_bits, [&](float x, int) {
    const bool here = x > -INFINITY;
    seen += here;
    sum += here ? x : 0.0f;
    squares += here ? x * x : 0.0f;
    low = fminf(low, here ? x : INFINITY);
    high = fmaxf(high, x);
  });
  seen = __reduce_add_sync(kFull, seen);
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sum += __shfl_xor_sync(kFull, sum, step);
    squares += __shfl_xor_sync(kFull, squares, step);
    low = fminf(low, __shfl_xor_sync(kFull, low, step));
    high = fmaxf(high, __shfl_xor_sync(kFull, high, step));
  }
  if (seen < rank) return {-INFINITY, high, 0};
  int most = seen;  // reach low
  const float top = high, inverse = __fdividef(1.0f, seen), mean = sum * inverse;
  const float share = (rank + 0.4f * slack) * inverse;
  float guess = mean + sqrtf(fmaxf(squares * inverse - mean * mean, 0.0f)) * (share < 0.5f ? normal_tail(share) : 0.0f);
#pragma unroll 1
  for (int i = 0; i < kTries; ++i) {
    if (!(guess > low && guess < high)) guess = 0.5f * (low + high);
    int reached = 0;
    each_score(scores, sample_bits, [&](float x, int) { reached += x >= guess; });
    reached = __reduce_add_sync(kFull, reached);
    if (reached >= rank && reached <= rank + slack) return {guess, top, 0};
    (reached < rank ? high : low) = guess;
    if (reached >= rank) most = reached;
    const float found = reached * inverse;
    guess = i < 4 && share < 0.5f && reached && found < 0.5f
                ? mean + (guess - mean) * __fdividef(normal_tail(share), normal_tail(found))
                : NAN;  // bisect
  }
  if (most <= 2 * rank) return {low, top, 0};
  const uint64_t tied = find_tied_pivot(scores, sample_bits, rank, slack, bins);
  return {from_order_key(uint32_t(tied >> sample_bits)), top, int(tied & ((1 << sample_bits) - 1))};
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
  // The kernel in front may still run: it writes none of the step's lengths, budgets and block tables.
  const RowPlan plan(p, row);
  float x[kChunks * 4];
  auto begin = [&] {
    touch(p);
    wait_for_previous();
    let_next_start();  // not before: scan fetches signatures as soon as it starts
    // One warp per query head of the group.
    if (warp < p.group) load_vector(x, p.query, row, kv_head * p.group + warp, p.page.words);
    if (threadIdx.x < p.score_heads_per_kv) p.work.count[set + threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      p.work.arrived[blockIdx.x] = 0;
      if (blockIdx.x == 0) *p.work.pieces = 0;
      if (kv_head == 0) count_row(p, plan);
    }
  };
  if (!plan.sparse) return begin();

  const int plane_words = p.head_quads * kPlanes * kChunks * 32;
  QueryMemory s;
  s.planes = reinterpret_cast<uint32_t*>(memory);
  s.bias = reinterpret_cast<int32_t*>(s.planes + plane_words);
  uint32_t* bins = reinterpret_cast<uint32_t*>(s.bias + 4 * kMaxHeadQuads);  // [score head][kPivotWords]
  float* scores = s.scratch = reinterpret_cast<float*>(bins + p.score_heads_per_kv * kPivotWords);  // [score head][sample]
  clear_queries<kChunks, kMode>(p, s);
  __syncthreads();

  // The pivots come from a sample of tiles, evenly spaced.
  const int rank = sample_rank(plan.need, sample, plan.length);
  const bool sampled = !p.scores && plan.length >= 2 * sample && rank < sample * 3 / 4 && plan.need > 0;
  const int64_t tiles = (plan.length + kTile - 1) / kTile;
  auto quad_at = [&](int i) { return int((i / 4 * tiles >> (sample_bits - 4)) * 4 + i % 4); };
  const int steps = sampled ? sample / kQuad / 8 / warps : 0;
  QueryFragments<kChunks, kMode, kQuads> query;
  scan_quads<kChunks, kMode, kQuads>(
      p.page, kv_head, p.block_table + row * p.blocks_per_row, plan.length, query, steps,
      [&](int step) { return quad_at((warp * steps + step) * 8 + lane / 4); }, begin,
      [&] {  // while the signatures are on their way
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
  __syncthreads();
  for (int head = warp; head < p.score_heads_per_kv; head += warps) {
    const Pivot pivot = find_pivot(scores + head * sample, sample_bits, rank, bins + head * kPivotWords);
    if (lane == 0) {
      const bool found = pivot.score > -INFINITY;
      p.work.pivot_score[set + head] = pivot.score;
      p.work.pivot_token[set + head] = found ? quad_at(pivot.position / kQuad) * kQuad : INT_MAX;
      // The k-th best lies between the pivot and a little above the best of the sample.
      p.work.pivot_scale[set + head] =
          found && pivot.top > pivot.score ? 0.5f * kBins / (pivot.top - pivot.score) : 0.0f;
    }
  }
}

// Shared memory of a block in bytes.
int encode_memory(const DecodeParams& p, int sample_bits) {
  const int chunks = p.page.words <= 4 ? 1 : 2;
  const int words = p.head_quads * query_planes(p.mode) * chunks * 32 + 4 * kMaxHeadQuads +
                    p.score_heads_per_kv * kPivotWords +
                    std::max(p.score_heads_per_kv << sample_bits, p.group * chunks * 4 * 32);
  return words * 4;
}

}  // namespace

int max_sample_bits(const DecodeParams& p) {
  int bits = 0;
  while (encode_memory(p, bits + 1) <= max_block_memory()) ++bits;
  return bits;
}

void encode(const DecodeParams& p, void* stream) {
  with_scan_types(p, [&](auto chunks, auto mode, auto quads) {
    // Large blocks are quicker, small ones share a processor.
    const int groups = p.num_rows * p.page.num_kv_heads;
    const int threads = groups <= num_multiprocessors() || p.group > 8 ? kMostThreads : kMostThreads / 2;
    launch(encode_kernel<decltype(chunks)::value, decltype(mode)::value, decltype(quads)::value>, dim3(groups),
           threads, encode_memory(p, p.sample_bits), stream, p.overlap, "encode", p, p.sample_bits);
  });
}

}  // namespace adamas
