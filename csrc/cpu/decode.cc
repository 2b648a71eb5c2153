// Runs the inner kernels on OpenMP threads, which vLLM's CPU worker has bound to cores.
//
// decode runs in two waves per group of rows, so that even one long context occupies every thread:
//   wave 1  dense rows: (row, KV head, chunk) -> softmax partials
//           sparse rows: (row, kSideBySide KV heads, chunk) -> scores
//   wave 2  dense rows: (row, query head) merges its partials
//           sparse rows: (row, token set) selects and attends
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"

namespace adamas {
namespace {

constexpr int kAttendChunk = 2048;               // tokens per item of wave 1, dense
constexpr int kScanChunk = 1024;                 // the same, sparse
constexpr int64_t kGroupFloats = 16ll << 20;     // workspace of one group of rows: 64 MiB

// A buffer that grows and is reused across calls, so that a decode step seldom allocates.
template <class T>
class Buffer {
 public:
  T* at_least(int64_t n) {
#ifdef __SANITIZE_ADDRESS__
    data_ = std::vector<T>(n);  // the exact size, so that any access past it is reported
#else
    if (int64_t(data_.size()) < n) data_.resize(n + n / 4);
#endif
    return data_.data();
  }

 private:
  std::vector<T> data_;
};

int64_t padded(int64_t tokens) { return (tokens + kTile - 1) / kTile * kTile; }
int parts(int64_t n, int size) { return int((n + size - 1) / size); }

struct RowPlan {
  bool sparse;
  int budget;
  int first, length;       // tokens [first, length) are visible
  int64_t scores;          // offset into the score buffer (sparse)
  int64_t partials;        // index of the first partial (dense)
  int64_t item1, item2;    // first item of each wave
};

// Scratch of one thread in wave 2.
struct Scratch {
  Buffer<int32_t> select, tokens;
  Buffer<float> queries, acc;
  Buffer<Partial> partials;

  Partial* heads(int n, int padded_size) {
    float* a = acc.at_least(int64_t(n) * padded_size);
    Partial* p = partials.at_least(n);
    for (int i = 0; i < n; ++i) p[i].acc = a + int64_t(i) * padded_size;
    return p;
  }
};

thread_local Scratch scratch;

RowPlan plan_row(const DecodeParams& p, int row) {
  RowPlan plan{};
  plan.length = p.seq_lens[row];
  plan.budget = p.budget(row);
  plan.sparse = plan.budget < plan.length && p.sliding_window == 0;
  plan.first = p.sliding_window > 0 ? std::max(0, plan.length - p.sliding_window) : 0;
  return plan;
}

// Merges the softmax partials of one query head into the first one.
void merge(Partial* partials, int count, int64_t step, int padded_size) {
  Partial& to = partials[0];
  for (int i = 1; i < count; ++i) {
    const Partial& from = partials[i * step];
    if (from.sum <= 0) continue;
    const float top = std::max(to.max, from.max);
    const float a = to.sum > 0 ? std::exp(to.max - top) : 0.0f, b = std::exp(from.max - top);
    for (int d = 0; d < padded_size; ++d) to.acc[d] = to.acc[d] * a + from.acc[d] * b;
    to.sum = to.sum * a + from.sum * b;
    to.max = top;
  }
}

// Writes the selected tokens to out: sinks, the best of the middle, the recent window. `budget` comes from
// DecodeParams::budget, so it includes sinks and recent window.
int select_row(const Kernels& kernels, const DecodeParams& p, const float* scores, int length, int budget,
               int32_t* out) {
  if (budget >= length) {
    for (int i = 0; i < length; ++i) out[i] = i;
    return length;
  }
  const int sinks = p.num_sink_tokens, recent = p.recent_window;
  for (int i = 0; i < sinks; ++i) out[i] = i;
  const int middle = length - sinks - recent, k = budget - sinks - recent;
  kernels.select(scores + sinks, middle, k, sinks, out + sinks,
                 scratch.select.at_least(2 * (int64_t(middle) + kTile)));
  for (int i = 0; i < recent; ++i) out[sinks + k + i] = length - recent + i;
  return budget;
}

// Computes the scores of some KV heads of one row.
void scan_heads(const Kernels& kernels, const DecodeParams& p, int row, int first_head, int heads,
                const QueryCode* codes, int first, int last, float* scores, int64_t stride) {
  const int sets = p.per_query_head ? p.group() : 1;  // score rows of a KV head
  const int count = p.summed() ? 1 : p.group();       // query codes of a KV head
  const Combine combine = p.maximum ? Combine::maximum : count > sets ? Combine::sum : Combine::none;
  kernels.scan(p, row, first_head, heads, codes + first_head * count, count, combine, first, last,
               scores + first_head * sets * stride, stride);
}

class Group {
 public:
  Group(const Kernels& kernels, const DecodeParams& p) : kernels_(kernels), p_(p) {}

  void run(int first_row, int last_row) {
    plan(first_row, last_row);
    float* scores = scores_.at_least(score_floats_);
    float* acc = acc_.at_least(num_partials_ * p_.page.padded_size());
    Partial* partials = partials_.at_least(num_partials_);
    for (int64_t i = 0; i < num_partials_; ++i) partials[i].acc = acc + i * p_.page.padded_size();
    QueryCode* codes = codes_.at_least(int64_t(rows_.size()) * p_.num_query_heads);
    int64_t attended = 0;
#pragma omp parallel reduction(+ : attended)
    {
#pragma omp for schedule(static)
      for (int r = 0; r < int(rows_.size()); ++r)
        if (rows_[r].sparse) kernels_.encode_queries(p_, first_row + r, codes + int64_t(r) * p_.num_query_heads);
      if (p_.maximum) {
#pragma omp for collapse(2) schedule(dynamic)
        for (int r = 0; r < int(rows_.size()); ++r)
          for (int head = 0; head < p_.page.num_kv_heads; ++head)
            if (rows_[r].sparse)
              kernels_.sample(p_, first_row + r, head, codes + int64_t(r) * p_.num_query_heads + head * p_.group());
      }
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items1_; ++item) {
        const int r = find(item, &RowPlan::item1);
        wave1(first_row + r, rows_[r], int(item - rows_[r].item1), codes + int64_t(r) * p_.num_query_heads,
              scores, partials, attended);
      }
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items2_; ++item) {
        const int r = find(item, &RowPlan::item2);
        wave2(first_row + r, rows_[r], int(item - rows_[r].item2), scores, partials, attended);
      }
    }
    for (const RowPlan& row : rows_) {
      p_.stats[row.sparse ? 0 : 1] += row.length > 0;
      p_.stats[2] += int64_t(row.length) * p_.num_query_heads;
    }
    p_.stats[3] += attended;
  }

  // End of the rows from first_row on that fit the workspace; at least one row.
  int extent(int first_row) const {
    int64_t floats = 0;
    int row = first_row;
    for (; row < p_.num_rows; ++row) {
      floats += padded(std::max(p_.seq_lens[row], 0)) * p_.score_heads();
      if (row > first_row && floats > kGroupFloats) break;
    }
    return row;
  }

 private:
  void plan(int first_row, int last_row) {
    rows_.clear();
    score_floats_ = num_partials_ = items1_ = items2_ = 0;
    for (int row = first_row; row < last_row; ++row) {
      RowPlan plan = plan_row(p_, row);
      plan.item1 = items1_;
      plan.item2 = items2_;
      plan.scores = score_floats_;
      plan.partials = num_partials_;
      if (plan.sparse) {
        items1_ += int64_t(parts(plan.length, kScanChunk)) * parts(p_.page.num_kv_heads, kSideBySide);
        items2_ += p_.score_heads();
        score_floats_ += padded(plan.length) * p_.score_heads();
      } else {
        const int n = parts(plan.length - plan.first, kAttendChunk);
        items1_ += int64_t(n) * p_.page.num_kv_heads;
        items2_ += p_.num_query_heads;
        num_partials_ += int64_t(n) * p_.num_query_heads;
      }
      rows_.push_back(plan);
    }
  }

  int find(int64_t item, int64_t RowPlan::*start) const {
    int lo = 0, hi = int(rows_.size());
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (rows_[mid].*start <= item ? lo : hi) = mid;
    }
    return lo;
  }

  void wave1(int row, const RowPlan& plan, int item, const QueryCode* codes, float* scores,
             Partial* partials, int64_t& attended) {
    const int group = p_.group(), all_heads = p_.page.num_kv_heads;
    if (plan.sparse) {
      const int splits = parts(all_heads, kSideBySide), chunk = item / splits;
      const int first = chunk * kScanChunk, last = std::min(plan.length, first + kScanChunk);
      const int head = item % splits * kSideBySide;
      scan_heads(kernels_, p_, row, head, std::min(all_heads - head, kSideBySide), codes, first, last,
                 scores + plan.scores, padded(plan.length));
    } else {
      const int kv_head = item % all_heads, chunk = item / all_heads;
      const int first = plan.first + chunk * kAttendChunk, last = std::min(plan.length, first + kAttendChunk);
      const int size = p_.page.padded_size();
      float* queries = scratch.queries.at_least(int64_t(group) * size);
      for (int g = 0; g < group; ++g) kernels_.load_query(p_, row, kv_head * group + g, queries + g * size);
      kernels_.attend(p_, row, kv_head, queries, group, nullptr, first, last - first,
                      partials + plan.partials + int64_t(chunk) * p_.num_query_heads + kv_head * group);
      attended += int64_t(last - first) * group;
    }
  }

  void wave2(int row, const RowPlan& plan, int item, const float* scores, Partial* partials,
             int64_t& attended) {
    const int size = p_.page.padded_size();
    if (!plan.sparse) {
      const int n = parts(plan.length - plan.first, kAttendChunk);
      if (n == 0) {  // an empty (padded) row
        Partial* empty = scratch.heads(1, size);
        empty->sum = 0;
        std::fill(empty->acc, empty->acc + size, 0.0f);
        kernels_.store_output(p_, row, item, *empty);
        return;
      }
      Partial* first = partials + plan.partials + item;
      merge(first, n, p_.num_query_heads, size);
      kernels_.store_output(p_, row, item, *first);
      return;
    }
    const int heads = p_.per_query_head ? 1 : p_.group();
    const int first_head = item * heads;
    int32_t* tokens = scratch.tokens.at_least(int64_t(plan.budget) + kTile);
    const int count = select_row(kernels_, p_, scores + plan.scores + item * padded(plan.length), plan.length,
                                 plan.budget, tokens);
    float* queries = scratch.queries.at_least(int64_t(heads) * size);
    Partial* out = scratch.heads(heads, size);
    for (int h = 0; h < heads; ++h) kernels_.load_query(p_, row, first_head + h, queries + h * size);
    kernels_.attend(p_, row, first_head / p_.group(), queries, heads, tokens, 0, count, out);
    for (int h = 0; h < heads; ++h) kernels_.store_output(p_, row, first_head + h, out[h]);
    attended += int64_t(count) * heads;
  }

  const Kernels& kernels_;
  const DecodeParams& p_;
  std::vector<RowPlan> rows_;
  int64_t score_floats_ = 0, num_partials_ = 0, items1_ = 0, items2_ = 0;

  // Shared by all calls, since the engine calls from one thread.
  static thread_local Buffer<float> scores_, acc_;
  static thread_local Buffer<Partial> partials_;
  static thread_local Buffer<QueryCode> codes_;
};

thread_local Buffer<float> Group::scores_, Group::acc_;
thread_local Buffer<Partial> Group::partials_;
thread_local Buffer<QueryCode> Group::codes_;

}  // namespace

void decode(const Kernels& kernels, const DecodeParams& p) {
  Group group(kernels, p);
  for (int row = 0; row < p.num_rows;) {
    const int end = group.extent(row);
    group.run(row, end);
    row = end;
  }
}

void scan(const Kernels& kernels, const DecodeParams& p, float* scores, int64_t row_stride,
          int64_t head_stride) {
  std::vector<QueryCode> codes(p.num_query_heads);
  std::vector<float> row_scores;
  for (int row = 0; row < p.num_rows; ++row) {
    const int length = p.seq_lens[row];
    const int64_t stride = padded(length);
    row_scores.resize(stride * p.score_heads() + 1);
    kernels.encode_queries(p, row, codes.data());
    for (int head = 0; p.maximum && length && head < p.page.num_kv_heads; ++head)
      kernels.sample(p, row, head, &codes[head * p.group()]);
    scan_heads(kernels, p, row, 0, p.page.num_kv_heads, codes.data(), 0, length, row_scores.data(), stride);
    for (int head = 0; head < p.score_heads(); ++head)
      std::copy_n(row_scores.data() + head * stride, length, scores + row * row_stride + head * head_stride);
  }
}

void select(const Kernels& kernels, const DecodeParams& p, const float* scores, int64_t row_stride,
            int64_t head_stride, int32_t* out, int64_t out_row_stride, int64_t out_head_stride) {
  for (int row = 0; row < p.num_rows; ++row)
    for (int head = 0; head < p.score_heads(); ++head) {
      const int length = p.seq_lens[row], budget = std::min(p.budget(row), length);
      int32_t* tokens = scratch.tokens.at_least(int64_t(budget) + kTile);
      const int count =
          select_row(kernels, p, scores + row * row_stride + head * head_stride, length, budget, tokens);
      std::copy_n(tokens, count, out + row * out_row_stride + head * out_head_stride);
    }
}

}  // namespace adamas
