// select: the exact top-k of given scores, ascending; one block per (row, head).
#include "sm90/bitmap.cuh"
#include "sm90/histogram.cuh"
#include "sm90/launch.cuh"
#include "sm90/order.cuh"
#include "sm90/rows.cuh"

namespace adamas {
namespace {

constexpr int kThreads = 256;

// Bits [first, last) of a word of a bitmap.
__device__ __forceinline__ uint32_t range_bits(int word, int first, int last) {
  const int low = max(first - word * 32, 0), high = min(last - word * 32, 32);
  if (low >= high) return 0;
  return (high == 32 ? kFull : (1u << high) - 1) & ~((1u << low) - 1);
}

__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ SelectParams p) {
  extern __shared__ __align__(16) uint32_t memory[];
  uint32_t* bins = memory;
  uint32_t* bitmap = memory + kHistogramWords;
  const int row = blockIdx.y, head = blockIdx.x;
  const int length = context_length(p, row), budget = min(max(p.budgets[row], p.least_budget), length);
  if (length <= 0) return;
  const bool all = budget >= length;
  const int first = all ? length : p.num_sink_tokens, last = all ? length : length - p.recent_window;
  const int words = (length + 31) / 32;
  for (int w = threadIdx.x; w < words; w += kThreads)
    bitmap[padded(w)] = range_bits(w, 0, first) | range_bits(w, last, length);
  __syncthreads();
  const int need = budget - p.num_sink_tokens - p.recent_window;
  if (!all && need > 0) {
    const float* scores = p.scores + row * p.row_stride + head * p.head_stride;
    const int bits = token_bits(length);
    auto each = [&](auto visit) {
      for (int t = first + threadIdx.x; t < last; t += kThreads) visit(rank_key(order_key(scores[t]), t, bits));
    };
    const uint64_t best = block_threshold<kThreads>(bins, 32 + bits, need, each);
    const uint64_t mask = (1ull << bits) - 1;
    each([&](uint64_t v) {
      if (v >= best) set_bit(bitmap, uint32_t(v & mask));
    });
    __syncthreads();
  }
  int32_t* to = p.tokens + row * p.tokens_row_stride + head * p.tokens_head_stride;
  each_set_bit<kThreads>(bitmap, words, bins, [&](int rank, int token) {
    if (rank < p.most) to[rank] = token;
  });
}

}  // namespace

void select(const SelectParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_heads == 0) return;
  const int smem = (kHistogramWords + bitmap_words(p.max_seq_len)) * 4;
  launch(select_kernel, dim3(p.num_heads, p.num_rows), kThreads, smem, stream, false, "select", p);
}

}  // namespace adamas
