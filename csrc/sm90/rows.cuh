// Rows of a decode step: context lengths, the tokens attended to, counters, and the division of work over rows into
// equal runs.
#pragma once
#include "sm90/params.h"
#include "sm90/reduce.cuh"

namespace adamas {

// Tokens of a row's context, clamped to [0, max_seq_len].
template <class Params>
__device__ __forceinline__ int context_length(const Params& p, int row) {
  int length = p.seq_lens[row];
  // One comparison for both bounds; in this form the clamp costs attend no register.
  if (uint32_t(length) > uint32_t(p.max_seq_len)) length = length < 0 ? 0 : p.max_seq_len;
  return length;
}

// The tokens that a row attends to: all visible tokens, or the sinks, the recent window and the `need` best of the
// tokens in between (the middle). Every thread computes it, at the cost of loading the length and the budget.
struct RowPlan {
  int length, first;  // tokens [first, length) are visible
  bool sparse;
  int budget, middle, need;

  __device__ RowPlan(const DecodeParams& p, int row) {
    length = context_length(p, row);
    budget = max(p.budgets ? p.budgets[row] : 0, p.least_budget);
    sparse = p.scores || (budget < length && p.sliding_window == 0);
    if (length <= 0) sparse = false;
    first = p.sliding_window > 0 ? max(0, length - p.sliding_window) : 0;
    middle = length - p.num_sink_tokens - p.recent_window;
    need = budget - p.num_sink_tokens - p.recent_window;
  }
};

// Tokens of a row's context if it is sparse, else 0.
__device__ __forceinline__ int sparse_length(const DecodeParams& p, int row) {
  const RowPlan plan(p, row);
  return plan.sparse ? plan.length : 0;
}

// Whether a token is in the middle; one comparison for both bounds.
__device__ __forceinline__ bool in_middle(const DecodeParams& p, const RowPlan& plan, int token) {
  return uint32_t(token - p.num_sink_tokens) < uint32_t(plan.middle);
}

// Adds a row to the counters; one thread per row.
__device__ __forceinline__ void count_row(const DecodeParams& p, const RowPlan& plan) {
  if (!p.stats || plan.length <= 0) return;
  auto* stats = reinterpret_cast<unsigned long long*>(p.stats);
  const int attended = plan.sparse ? plan.budget : plan.length - plan.first;
  atomicAdd(stats + (plan.sparse ? 0 : 1), 1ull);
  atomicAdd(stats + 2, (unsigned long long)(plan.length) * p.num_query_heads);
  atomicAdd(stats + 3, (unsigned long long)(attended) * p.num_query_heads);
}

// Counts a token set whose selection took more than one pass; one thread per set.
__device__ __forceinline__ void count_search(const DecodeParams& p) {
  if (p.stats) atomicAdd(reinterpret_cast<unsigned long long*>(p.stats) + kSearchedAgain, 1ull);
}

// Exclusive prefix sums of work(row) in shared memory: cum[0 .. rows]. All threads call it; the first warp computes
// them, one row per lane. Ends synchronised.
template <class Work>
__device__ void prefix_sum_rows(int64_t* cum, int rows, Work work) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    int64_t total = 0;
    for (int base = 0; base < rows; base += 32) {
      const int64_t own = base + lane < rows ? work(base + lane) : 0, sum = warp_prefix_sum(own);
      if (base + lane < rows) cum[base + lane] = total + sum - own;
      total += __shfl_sync(kFull, sum, 31);
    }
    if (lane == 0) cum[rows] = total;
  }
  __syncthreads();
}

// The row of item `at`: the last one with cum[row] <= at.
__device__ __forceinline__ int find_row(const int64_t* cum, int rows, int64_t at) {
  int low = 0, high = rows;
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (cum[mid] <= at ? low : high) = mid;
  }
  return low;
}

}  // namespace adamas
