// The shared memory of a block of attend. A block processes a token set, then dense work, in the same memory.
#pragma once
#include "sm90/attention.cuh"
#include "sm90/bitmap.cuh"
#include "sm90/dense.cuh"
#include "sm90/histogram.cuh"

namespace adamas {

template <int D, class T, int kTiles, int kThreads, bool kFp8>
struct AttendShape {
  using Element = T;
  using Softmax = Attention<D, T, kTiles, kFp8>;
  static constexpr int kHeadSize = D, kNumThreads = kThreads, kWarps = kThreads / 32;
  static constexpr int kRowBytes = Softmax::kRowBytes;

  // For a token set, in this order: sums of each_set_bit; bins and kept candidates, or staged K and V rows; addresses
  // of selected tokens; the bitmap. The final merge of the warps reuses the memory of all but the sums and the bitmap.
  static constexpr int kSums = 16 * 4;
  // With many token sets, whole rows are staged in shared memory, because DRAM serves them faster than pieces of rows.
  // The padding keeps the rows that a load touches in different banks.
  static constexpr bool kStaged = kThreads <= 128;
  static constexpr int kStagedRow = kRowBytes + 16, kStagedBytes = 2 * kChunk * kStagedRow;  // a warp's K and V
  static constexpr int kPieces = kRowBytes / 16;  // per row
  static constexpr int kKept = kStaged ? 1792 : 4096;  // candidates in shared memory, mostly all of a set
  static constexpr int kSelectBytes = kHistogramWords * 4 + kKept * 8;
  static constexpr int kFrontBytes =
      kStaged && kWarps * kStagedBytes > kSelectBytes ? kWarps * kStagedBytes : kSelectBytes;
  static constexpr int kList = 8 * kThreads;  // addresses at a time

  // The most that a step needs.
  static constexpr int kMostMerge = kWarps * 8 * Softmax::kHeadFloats * 4, kMostSelect = kFrontBytes + kList * 8;
  static constexpr int kMostSparse = kSums + (kMostSelect > kMostMerge ? kMostSelect : kMostMerge) +
                                     (bitmap_words(kMaxContext) + 3) / 4 * 16;
  static_assert(kMostSparse <= kBlockMemory && (kMaxRows + 1) * 8 + 32 + kMostMerge <= kBlockMemory);

  static __host__ __device__ int merge_bytes(const DecodeParams& p) {
    return kWarps * (p.group < 8 ? p.group : 8) * Softmax::kHeadFloats * 4;
  }
  // Bins, candidates and addresses, or the merge.
  static __host__ __device__ int scratch_bytes(const DecodeParams& p) {
    const int select = kFrontBytes + kList * 8, merge = merge_bytes(p);
    return select > merge ? select : merge;
  }

  static int shared_bytes(const DecodeParams& p) {
    const int bitmap = (bitmap_words(p.max_seq_len) + 3) / 4 * 16, dense = dense_bytes<Softmax>(p, kWarps);
    const int sparse = kSums + scratch_bytes(p) + bitmap;
    return sparse > dense ? sparse : dense;
  }
};

}  // namespace adamas
