// Scores of the rows of one request, which verify drafts, from one reading of its signatures (dot_max).
//
// An instruction multiplies 16 tokens x 32 dimensions by 8 columns, in integers of 8 bits (bytes.cuh). Columns 2c and 2c+1
// of tile t hold heads 2t and 2t+1 of row c of the run, so a lane (row = lane / 4, c = lane % 4) gets the scores of all
// heads of one row for its own token quad, and their maximum without any exchange. Codes are widened once for all rows.
#pragma once
#include "sm90/bytes.cuh"
#include "sm90/decode_split/queue.cuh"
#include "sm90/rows.cuh"
#include "sm90/score.cuh"

namespace adamas {

// The encoded queries of one (run, KV head) as this lane's fragments.
template <int kTiles>
struct SharedQuery {
  uint32_t word[kTiles][kByteWords];
  int start[kTiles][2];          // what a sum starts with
  HeadWeight weight[kTiles][2];  // heads past the last one never have the maximum

  // A score's integer is 2 sum(q * code) - bias, and a sum adds up to 16 sum(q * code). It starts so that it ends as the bits
  // of a float, kOrigin + the integer: the last bit of such a float is 1/8.
  static constexpr float kOrigin = 1572864.0f;  // 1.5 * 2^20

  // A row past the run's end has any queries; its lanes list no tokens.
  __device__ void load(const DecodeParams& p, int row, int kv_head) {
    const int lane = threadIdx.x % 32;
    auto group = [&](int i) {
      return (int64_t(min(row + i, p.num_rows - 1)) * p.page.num_kv_heads + kv_head) * p.head_quads;
    };
    const uint4* bytes = reinterpret_cast<const uint4*>(kHopper ? p.work.bytes : p.work.planes);
    const int64_t column = group(lane / 8), own = group(lane % 4);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int head = 2 * t + lane / 4 % 2, at_word = lane % 4;
      const bool here = head < p.group && at_word < p.page.words;
#pragma unroll
      for (int i = 0; i < kByteWords; i += 4) {
        const int64_t at = ((column + head / 4) * 16 + head % 4 * 4 + at_word) * kByteWords + i;
        const uint4 x = here ? bytes[at / 4] : make_uint4(0, 0, 0, 0);
        word[t][i] = x.x, word[t][i + 1] = x.y, word[t][i + 2] = x.z, word[t][i + 3] = x.w;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int head = 2 * t + j;
        start[t][j] = __float_as_int(kOrigin) - 8 * (head < p.group ? p.work.bias[own * 4 + head] : 0);
        weight[t][j] = head < p.group ? p.work.weights[own * 4 + head] : HeadWeight{0.0f, INFINITY};
      }
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void score_set(const SharedQuery<kTiles>& query, const Signatures<1, Mode::dot_max>& s, int,
                                          float (&score)[4]) {
  const QuadWords<1> words(s);
  const float2 s01 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.x));
  const float2 s23 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.y));
  const float scale[4] = {s01.x, s01.y, s23.x, s23.y};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    int sum[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[t][i] = query.start[t][i % 2];
    const CodeFields x(words.hi[0][2 * pair], words.lo[0][2 * pair]);
    const CodeFields y(words.hi[0][2 * pair + 1], words.lo[0][2 * pair + 1]);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) mma_field(sum[t], x, y, n, query.word[t][2 * n], query.word[t][2 * n + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float origin = -SharedQuery<kTiles>::kOrigin * scale[2 * pair + i];  // exact
      float best;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          // The integer times the scale, rounded once as in score_quad(); a zero is never negative, which is equal.
          const float own = __fmaf_rn(__int_as_float(sum[t][2 * i + j]), scale[2 * pair + i], origin);
          const float logit = __fmul_rn(own, query.weight[t][j].factor);
          const float x = __fsub_rn(logit, query.weight[t][j].log_sum);
          best = t + j ? fmaxf(best, x) : x;
        }
      score[2 * pair + i] = best;
    }
  }
}

// The rows that a warp scores together: up to kRunRows consecutive ones of a request, which have one block table. They begin
// with `row`, and each has one token set; a lane has that of row lane % kRunRows.
template <int kTiles>
struct SharedRows {
  static constexpr int kQueue = 16;  // entries of a lane's queue, which fill at the same tokens
  static constexpr int kSetQuads = 1, kScores = kQuad, kSetStride = kRunRows;
  static __device__ __forceinline__ int first() { return 0; }
  static __device__ __forceinline__ int set(int) { return threadIdx.x % kRunRows; }
  using Query = SharedQuery<kTiles>;

  int row, end;     // end: of the middle of the lane's row
  int own_length;   // of the lane's row if it is sparse, else 0

  // Whether the row that is i rows after one that begins a run is in the run.
  static __device__ __forceinline__ bool has(const DecodeParams& p, int row, int i) {
    return row + i < p.num_rows && p.positions[row + i] == p.positions[row] + i;
  }
  // The longest context of a run's sparse rows; 0 if no run begins with the row.
  static __device__ int length(const DecodeParams& p, int row) {
    int longest = 0;
    if (p.positions[row] % kRunRows) return 0;
#pragma unroll
    for (int i = 0; i < kRunRows; ++i)
      if (has(p, row, i)) longest = max(longest, sparse_length(p, row + i));
    return longest;
  }
  __device__ SharedRows(const DecodeParams& p, int row) : row(row) {
    const bool here = has(p, row, set(0));
    const RowPlan plan(p, here ? row + set(0) : row);
    end = p.num_sink_tokens + plan.middle, own_length = here && plan.sparse ? plan.length : 0;
  }
  __device__ int length() const { return __reduce_max_sync(kFull, own_length); }
  __device__ int least_end() const { return __reduce_min_sync(kFull, end); }
  __device__ TokenSets sets(const DecodeParams& p, int kv_head) const {
    return {row * p.page.num_kv_heads + kv_head, kRunRows, p.page.num_kv_heads};
  }
  __device__ bool listed(int) const { return own_length > 0; }
  __device__ void load(Query& query, const DecodeParams& p, int kv_head) const { query.load(p, row, kv_head); }
};

}  // namespace adamas
