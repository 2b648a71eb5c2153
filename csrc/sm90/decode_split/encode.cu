// encode, the first of the three kernels: encodes queries as bit planes, and finds a pivot per token set that leaves
// few candidates.
//
// One block per (row, KV head). Each warp encodes a query head, all warps score a sample of the context, and one warp
// finds the pivot of a token set. The pivot only affects how many candidates scan writes: attend checks their number
// and is exact in every case. Signatures of the sample are loaded before the queries are available, because these
// loads would dominate the latency of the kernel.
#include <algorithm>

#include "sm90/decode_split/dispatch.cuh"
#include "sm90/decode_split/pivot.cuh"
#include "sm90/decode_split/scan_quads.cuh"
#include "sm90/launch.cuh"
#include "sm90/query.cuh"
#include "sm90/rows.cuh"
#include "sm90/sample.h"

namespace adamas {
namespace {

constexpr int kMostThreads = 512;

// Registers are limited so that a block of scan fits next to two blocks of encode and fetches its first stages early.
// On other GPUs no kernel starts early, or scan has smaller blocks.
constexpr int most_registers(int quads) { return quads == 4 || !kHopper ? 128 : 80; }

// Heads whose scores encode keeps.
__host__ __device__ int scored_heads(const DecodeParams& p) {
  return p.mode == Mode::dot_max ? p.group : p.score_heads_per_kv;
}

// The log-sum-exp of a head's logits in `count` tiles, every `every`-th of the sample, by one warp.
__device__ __forceinline__ float sample_log_sum(const float* logits, int every, int count) {
  auto each = [&](auto visit) {
    for (int i = threadIdx.x % 32; i < count * kTile; i += 32) visit(logits[i / kTile * every * kTile + i % kTile]);
  };
  float top = -INFINITY;
  each([&](float logit) { top = fmaxf(top, logit); });
  top = warp_max(top);
  uint32_t sum = 0;
  each([&](float logit) { sum += logit > -INFINITY ? sum_term(logit, top) : 0; });
  return log_sum(top, __reduce_add_sync(kFull, sum));
}

template <int kChunks, Mode kMode, int kQuads>
__global__ void __maxnreg__(most_registers(kQuads))
    encode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int kPlanes = query_planes(kMode);
  const int threads = blockDim.x, warps = threads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x / p.page.num_kv_heads, kv_head = blockIdx.x % p.page.num_kv_heads;
  const int set = blockIdx.x * p.score_heads_per_kv;
  // The preceding kernel may still run: it writes none of the step's lengths, budgets and block tables.
  const RowPlan plan(p, row);
  float x[kChunks * 4];
  auto begin = [&] {
    prefetch_params(p);
    wait_for_preceding_kernel();
    launch_dependents();  // not earlier, because scan fetches signatures as soon as it starts
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
  const int bits = sample_bits(plan.length, p.sample_bits), sample = 1 << bits;

  const int plane_words = p.head_quads * kPlanes * kChunks * 32;
  QueryMemory s;
  s.planes = reinterpret_cast<uint32_t*>(memory);
  s.bias = reinterpret_cast<int32_t*>(s.planes + plane_words);
  s.weights = reinterpret_cast<HeadWeight*>(s.bias + 4 * kMaxHeadQuads);
  s.bytes = kHopper && p.positions ? p.work.bytes + int64_t(blockIdx.x) * p.head_quads * kByteWords * kChunks * 16 : nullptr;
  auto* counts = reinterpret_cast<SampleCounts*>(s.weights + 4 * kMaxHeadQuads);          // [score head]
  float* scores = s.scratch = reinterpret_cast<float*>(counts + p.score_heads_per_kv);  // [scored head][sample]
  clear_queries<kChunks, kMode>(p, s);
  for (int i = threadIdx.x; i < p.score_heads_per_kv * int(sizeof(SampleCounts) / 4); i += threads)
    reinterpret_cast<uint32_t*>(counts)[i] = 0;
  __syncthreads();

  // The sample consists of whole tiles, one in each of as many equal parts of the context. In every second part it is
  // the first tile, in the others it may be any, so that no period of the context escapes the sample. Every token is a
  // candidate, without a sample, if the sample would be most of the context or the pivot would rank near its end.
  const int rank = sample_rank(plan.need, sample, plan.length, kLeastSpread);
  const bool sampled = !p.scores && plan.length >= 2 * sample && rank < sample * 3 / 4 && plan.need > 0;
  const int64_t tiles = (plan.length + kTile - 1) / kTile;
  // A maximum needs the log-sum-exp of the first tiles of kSampleTiles parts in any case.
  const bool summed = kMode == Mode::dot_max;
  auto quad_at = [&](int i) {
    const int part = i / 4, inside = part % 2 ? part * 39 % 64 : 0;  // in 64ths of a part
    if (summed && !sampled) return sum_tile(part, int(tiles)) * 4 + i % 4;
    return int(((part * 64 + inside) * tiles >> (bits + 2)) * 4 + i % 4);
  };
  const int sampled_tokens = sampled ? sample : summed ? kSampleTiles * kTile : 0;
  const int steps = sampled_tokens / kQuad / 8 / warps;
  QueryFragments<kChunks, kMode, kQuads> query;
  scan_quads<kChunks, kMode>(
      p.page, kv_head, row_blocks(p, row), plan.length, steps,
      [&](int step) { return quad_at((warp * steps + step) * 8 + lane / 4); }, begin,
      [&] {  // while the signatures are being loaded
        encode_queries<kChunks, kMode, kHopper && kMode == Mode::dot_max && kChunks == 1>(p, x, s);
        query.load(s.planes, s.bias, p.head_quads);
        if constexpr (kMode == Mode::dot_max) query.load_weights(s.weights, p.head_quads);
      },
      [&](int step, int token, const Signatures<kChunks, kMode>& signatures) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const int head = q * 4 + lane % 4;
          float score[4];
          if constexpr (kMode == Mode::dot_max) logit_quad(query, signatures, q, score);
          else score_quad(query, signatures, q, score);
          if (head >= scored_heads(p)) continue;
          auto kept = [&](int i) {
            const bool here = summed ? token + i < plan.length : in_middle(p, plan, token + i);
            return here ? score[i] : -INFINITY;
          };
          const int at = ((warp * steps + step) * 8 + lane / 4) * 4;
          *reinterpret_cast<float4*>(scores + head * sampled_tokens + at) =
              make_float4(kept(0), kept(1), kept(2), kept(3));
        }
      });
  if constexpr (kMode == Mode::dot_max) {
    __syncthreads();
    // Parts of the sample that begin with the same tile as those of the log-sum-exp; few tiles are all summed.
    const int every = sampled ? (sample / kTile) / kSampleTiles : 1, count = min(int(tiles), kSampleTiles);
    for (int head = warp; head < p.group; head += warps) {
      const float log_sum = sample_log_sum(scores + head * sampled_tokens, every, count);
      if (lane == 0) s.weights[head].log_sum = log_sum;
    }
    __syncthreads();
    if (threadIdx.x < 4 * p.head_quads) p.work.weights[blockIdx.x * 4 * p.head_quads + threadIdx.x] = s.weights[threadIdx.x];
    for (int i = threadIdx.x; sampled && i < sample; i += threads) {
      float best = -INFINITY;
      for (int head = 0; head < p.group; ++head)
        best = fmaxf(best, __fsub_rn(scores[head * sample + i], s.weights[head].log_sum));
      scores[i] = in_middle(p, plan, quad_at(i / kQuad) * kQuad + i % kQuad) ? best : -INFINITY;
    }
  }
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
  const float share = __fdividef(float(rank), float(sample));
  count_samples(Sample{scores, bits}, p.score_heads_per_kv, share, counts);
  for (int head = warp; head < p.score_heads_per_kv; head += warps) {
    const Pivot pivot = find_pivot(Sample{scores + head * sample, bits}, counts[head], share, plan.need, plan.length);
    if (lane == 0) {
      const bool found = pivot.score > -INFINITY;
      p.work.pivot_score[set + head] = pivot.score;
      p.work.pivot_token[set + head] = found ? quad_at(pivot.position / kQuad) * kQuad : INT_MAX;
      p.work.pivot_scale[set + head] = pivot.scale;
    }
  }
}

// Shared memory of a block in bytes.
int encode_memory(const DecodeParams& p, int bits) {
  const int chunks = p.page.words <= 4 ? 1 : 2;
  const int kept = std::max(1 << bits, p.mode == Mode::dot_max ? kSampleTiles * kTile : 0);  // per scored head
  const int words = p.head_quads * query_planes(p.mode) * chunks * 32 + 4 * kMaxHeadQuads +
                    4 * kMaxHeadQuads * int(sizeof(HeadWeight) / 4) +
                    p.score_heads_per_kv * int(sizeof(SampleCounts) / 4) +
                    std::max(scored_heads(p) * kept, p.group * chunks * 4 * 32);
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
    // Large blocks are faster, but small ones can share a multiprocessor.
    const int groups = p.num_rows * p.page.num_kv_heads;
    const int threads = groups <= num_multiprocessors() || p.group > 8 ? kMostThreads : kMostThreads / 2;
    launch(encode_kernel<decltype(chunks)::value, decltype(mode)::value, decltype(quads)::value>, dim3(groups),
           threads, encode_memory(p, p.sample_bits), stream, p.overlap, "encode", p);
  });
}

}  // namespace adamas
