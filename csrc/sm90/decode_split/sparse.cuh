// One token set of one row, processed by a block of attend: select, look up addresses, attend, write the output.
//
// Selected tokens are collected in a bitmap, so that their addresses ascend whatever the order of the candidates: the
// output does not depend on how scan's warps were interleaved. After scan has finished, the expected candidates are
// fetched before their number is known.
#pragma once
#include "sm90/decode_split/candidates.cuh"
#include "sm90/decode_split/memory.cuh"
#include "sm90/decode_split/rescan.cuh"
#include "sm90/launch.cuh"

namespace adamas {

template <class Shape>
__device__ void attend_sparse(const DecodeParams& p, int set, uint8_t* memory) {
  using T = typename Shape::Element;
  using Softmax = typename Shape::Softmax;
  constexpr int kThreads = Shape::kNumThreads, kWarps = Shape::kWarps, kList = Shape::kList;
  const int sets_per_row = p.score_heads_per_kv * p.page.num_kv_heads;
  const int row = set / sets_per_row, kv_head = set % sets_per_row / p.score_heads_per_kv;
  const int score_head = set % p.score_heads_per_kv;
  const int heads = p.per_query_head ? 1 : p.group;
  const int first_head = kv_head * p.group + (p.per_query_head ? score_head : 0);
  const int warp = threadIdx.x / 32;
  prefetch_params(p);
  const RowPlan plan(p, row);
  if (plan.length <= 0) {
    wait_for_preceding_kernel();  // so that scan and encode have finished when attend has
    for (int h = 0; h < heads; ++h) {
      for (int i = threadIdx.x; i < Shape::kHeadSize; i += kThreads)
        head_vector<T>(p.output, row, first_head + h)[i] = T(0.0f);
      if (threadIdx.x == 0) store_lse(p, row, first_head + h, -INFINITY, 0);
    }
    return;
  }
  if (!plan.sparse) return;

  uint32_t* sums = reinterpret_cast<uint32_t*>(memory);
  uint8_t* staged = memory + Shape::kSums;  // shared with bins and candidates
  uint32_t* bins = reinterpret_cast<uint32_t*>(staged);
  uint8_t* list = staged + Shape::kFrontBytes;
  uint32_t* bitmap = reinterpret_cast<uint32_t*>(staged + Shape::scratch_bytes(p));
  const int words = (plan.length + 31) / 32;
  for (int i = threadIdx.x; i < (bitmap_words(plan.length) + 3) / 4; i += kThreads)
    reinterpret_cast<uint4*>(bitmap)[i] = uint4{};
  for (int i = threadIdx.x; i < kBinWords; i += kThreads) bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_sink_tokens + p.recent_window; i += kThreads) {
    const int token = i < p.num_sink_tokens ? i : plan.length - 1 - (i - p.num_sink_tokens);
    if (uint32_t(token) < uint32_t(plan.length)) set_bit(bitmap, token);
  }

  using Candidates = CandidateList<kThreads, Shape::kKept>;
  const Candidates candidates(p, set, bins);
  const int expected = plan.need > 0 ? Candidates::expected(p, plan) : 0;

  wait_for_preceding_kernel();
  candidates.fetch(0, expected);  // while their number is being loaded
  const uint32_t count = p.work.count[set];
  const ScoreBins bin_at{p.work.pivot_score[set], p.work.pivot_scale[set]};
  if (plan.need > 0) {
    if (count >= uint32_t(plan.need) && count <= uint32_t(p.capacity)) {
      candidates.fetch(expected, min(int(count), Shape::kKept));
      wait_for_async_copies();
      select_candidates(p, candidates, plan, int(count), bin_at, bins, bitmap);
    } else {
      wait_for_async_copies();  // they write to the memory of the search's bins
      if (threadIdx.x == 0) count_search(p);
      select_from_scan<kThreads, Shape::kHeadSize <= 128 ? 1 : 2>(p, row, kv_head, score_head, plan, bins, bitmap);
    }
  }
  __syncthreads();
  Softmax softmax;
  softmax.start(p, row, first_head, heads);
  // Addresses of the selected tokens in ascending order, kList at a time.
  int64_t* offsets = reinterpret_cast<int64_t*>(list);
  const int32_t* blocks = row_blocks(p, row);
  const uint8_t* pages = head_pages(p, kv_head);
  staged += warp * Shape::kStagedBytes;
  for (int round = 0;; round += kList) {
    const int total = each_set_bit<kThreads>(bitmap, words, sums, [&](int rank, int token) {
      if (uint32_t(rank - round) < uint32_t(kList)) offsets[rank - round] = token;
    });
    __syncthreads();
    const int here = min(total - round, kList);
    constexpr int kAhead = Shape::kStaged ? 4 : 1;  // tokens per thread whose block loads are in flight at once
    for (int first = threadIdx.x; first < here; first += kAhead * kThreads) {
      int64_t at[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        at[i] = key_offset<Shape::kRowBytes>(
            p.page, blocks, int(offsets[first + (first + i * kThreads < here ? i * kThreads : 0)]));
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * kThreads < here) offsets[first + i * kThreads] = at[i];
    }
    __syncthreads();
    for (int chunk = warp * kChunk; chunk < here; chunk += kWarps * kChunk) {
      if constexpr (Shape::kStaged) {
        const int slots = min(here - chunk, kChunk);
        __syncwarp();  // every lane has read the previous rows
#pragma unroll
        for (int i = 0; i < kChunk * Shape::kPieces / 32; ++i) {
          const int at = i * 32 + threadIdx.x % 32, slot = at / Shape::kPieces, piece = at % Shape::kPieces * 16;
          if (slot >= slots) continue;
          const uint8_t* from = pages + offsets[chunk + slot] + piece;
          const uint32_t to = shared_address(staged) + slot * Shape::kStagedRow + piece;
          copy_async16(to, from);
          copy_async16(to + kChunk * Shape::kStagedRow, from + p.page.v_offset);
        }
        wait_for_async_copies();
        __syncwarp();
        softmax.template step<true>(p, [&](int slot) { return staged + min(slot, slots - 1) * Shape::kStagedRow; },
                                    kChunk * Shape::kStagedRow, 0, slots);
      } else {
        softmax.step(p, [&](int slot) { return pages + offsets[min(chunk + slot, here - 1)]; }, p.page.v_offset, 0,
                     here - chunk);
      }
    }
    if (round + kList >= total) break;
    __syncthreads();
  }
  softmax.finish();
  softmax.write_merged(p, kWarps, reinterpret_cast<float*>(memory + Shape::kSums), row, first_head, heads);
}

}  // namespace adamas
