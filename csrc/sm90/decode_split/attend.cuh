// attend: from candidates to the output. Each block first takes a (row, token set), which it selects and
// attends to; then the blocks in front share the tokens of the dense rows as workers, and the last worker of
// a (row, KV head) merges.
#pragma once
#include "sm90/softmax.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/score.cuh"
#include "sm90/select.cuh"

namespace adamas {

constexpr int kChunk = 16;  // tokens of one step of a warp

// The candidates do not hold the k best (the sample misled the pivot): scores are computed again, once
// per pass of the radix selection. Any score distribution ends here at worst, and it is exact.
template <int kAttendThreads, int kChunks, Mode kMode>
__device__ __noinline__ void select_from_scan(const DecodeParams& p, int row, int kv_head, int head,
                                              const RowPlan& plan, uint32_t* bins, uint32_t* bitmap) {
  constexpr int kAttendWarps = kAttendThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t group = int64_t(row) * p.page.num_kv_heads + kv_head;
  const int quad = head / 4;
  constexpr int kQuadWords = query_planes(kMode) * kChunks * 32;
  QueryFragments<kChunks, kMode, 1> query;
  query.load(p.work.planes + (group * p.head_quads + quad) * kQuadWords,
             p.work.bias + (group * p.head_quads + quad) * 4,
             kMode == Mode::manhattan_sum ? p.head_quads : 1);
  const int bits = token_bits(plan.length);
  const int all = (plan.length + 31) / 32;
  const int steps = (all - warp + kAttendWarps - 1) / kAttendWarps;
  auto each = [&](auto visit) {
    scan_quads<kChunks, kMode, 1>(
        p.page, kv_head, p.block_table + row * p.blocks_per_row, plan.length, query, max(steps, 0),
        [&](int step) { return (warp + step * kAttendWarps) * 8 + lane / 4; }, [] {}, [] {},
        [&](int, int token, int, const float(&score)[4]) {
          if (lane % 4 != head % 4) return;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (uint32_t(token + i - p.num_sink_tokens) < uint32_t(plan.middle))
              visit(ranked(order_key(score[i]), token + i, bits));
        });
    __syncwarp();
  };
  const uint64_t best = block_threshold<kAttendThreads>(bins, 32 + bits, plan.need, each);
  const uint64_t mask = (1ull << bits) - 1;
  each([&](uint64_t v) {
    if (v >= best) set_bit(bitmap, uint32_t(v & mask));
  });
}

template <int D, class T, int kTiles, int kAttendThreads, bool kFp8>
struct Attend {
  static constexpr int kAttendWarps = kAttendThreads / 32;
  using Softmax = Attention<D, T, kTiles, kFp8>;
  static constexpr int kRowBytes = Softmax::kRowBytes;
  static constexpr int kWordChunks = D <= 128 ? 1 : 2;
  static constexpr int kStateFloats = Softmax::kFloats * 32;
  static constexpr int kList = 8 * kAttendThreads;  // selected tokens that are looked up at a time
  // Many token sets: whole rows go through shared memory, since the memory serves them faster than pieces
  // of them. The padding keeps the rows that a load touches in different banks.
  static constexpr bool kStaged = kAttendThreads <= 128;
  static constexpr int kStagedRow = kRowBytes + 16, kStagedBytes = 2 * kChunk * kStagedRow;  // K and V of a step
  static constexpr int kPieces = kRowBytes / 16;  // of a row
  static constexpr int kKept = kStaged ? 1792 : 4096;  // candidates in shared memory, mostly all of a set
  static constexpr int kMembers = 128;  // of the edge bin, that are ranked one by one
  static constexpr int kSums = 16 * 4;
  static constexpr int kSelectBytes = kSelectWords * 4 + kKept * 8;
  static constexpr int kFrontBytes =
      kStaged && kAttendWarps * kStagedBytes > kSelectBytes ? kAttendWarps * kStagedBytes : kSelectBytes;

  static __host__ __device__ int merge_bytes(const DecodeParams& p) {
    return kAttendWarps * (p.group < 8 ? p.group : 8) * Softmax::kHeadFloats * 4;
  }
  // Bins, candidates and list; in the end the merge lies in their place.
  static __host__ __device__ int scratch_bytes(const DecodeParams& p) {
    const int select = kFrontBytes + kList * 8, merge = merge_bytes(p);
    return select > merge ? select : merge;
  }

  static int shared_bytes(const DecodeParams& p) {
    const int bitmap = (bitmap_words(p.max_seq_len) + 3) / 4 * 16, rows = (p.num_rows + 1) * 8;
    const int front = kSums + scratch_bytes(p) + bitmap, back = rows + 32 + merge_bytes(p);
    return front > back ? front : back;
  }

  static __device__ const T* query_of(const DecodeParams& p, int row, int head) {
    return static_cast<const T*>(p.query.data) + row * p.query.token_stride + head * p.query.head_stride;
  }
  static __device__ T* output_of(const DecodeParams& p, int row, int head) {
    return static_cast<T*>(p.output.data) + row * p.output.token_stride + head * p.output.head_stride;
  }

  // One token set of one row.
  static __device__ void sparse(const DecodeParams& p, int set, uint8_t* memory) {
    const int sets_per_row = p.score_heads_per_kv * p.page.num_kv_heads;
    const int row = set / sets_per_row, kv_head = set % sets_per_row / p.score_heads_per_kv;
    const int score_head = set % p.score_heads_per_kv;
    const int heads = p.per_query_head ? 1 : p.group;
    const int first_head = kv_head * p.group + (p.per_query_head ? score_head : 0);
    const int warp = threadIdx.x / 32;
    touch(p);
    const RowPlan plan(p, row);
    if (plan.length <= 0) {
      wait_for_previous();  // when attend has finished, so have scan and encode
      for (int h = 0; h < heads; ++h)
        for (int i = threadIdx.x; i < D; i += kAttendThreads) output_of(p, row, first_head + h)[i] = T(0.0f);
      return;
    }
    if (!plan.sparse) return;

    uint32_t* sums = reinterpret_cast<uint32_t*>(memory);
    uint8_t* staged = memory + kSums;  // where bins and candidates are
    uint32_t* bins = reinterpret_cast<uint32_t*>(staged);
    uint8_t* list = staged + kFrontBytes;
    uint32_t* bitmap = reinterpret_cast<uint32_t*>(staged + scratch_bytes(p));
    const int words = (plan.length + 31) / 32;
    for (int i = threadIdx.x; i < (bitmap_words(plan.length) + 3) / 4; i += kAttendThreads)
      reinterpret_cast<uint4*>(bitmap)[i] = uint4{};
    for (int i = threadIdx.x; i < kBinWords; i += kAttendThreads) bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_sink_tokens + p.recent_window; i += kAttendThreads) {
      const int token = i < p.num_sink_tokens ? i : plan.length - 1 - (i - p.num_sink_tokens);
      if (uint32_t(token) < uint32_t(plan.length)) set_bit(bitmap, token);
    }

    const Candidates candidates(p, set, bins);
    const int expected = plan.need > 0 ? Candidates::expected(p, plan) : 0;

    wait_for_previous();
    candidates.fetch(0, expected);  // while their number is on its way
    const uint32_t count = p.work.count[set];
    const Bins bins_of{p.work.pivot_score[set], p.work.pivot_scale[set]};
    if (plan.need > 0) {
      if (count >= uint32_t(plan.need) && count <= uint32_t(p.capacity)) {
        candidates.fetch(expected, min(int(count), kKept));
        wait_for_copies();  // a thread fetches what it looks at
        from_candidates(candidates, plan, int(count), bins_of, bins, bitmap);
      } else {
        wait_for_copies();
        from_scan(p, row, kv_head, score_head, plan, bins, bitmap);
      }
    }
    __syncthreads();
    Softmax softmax;
    softmax.e5m2 = p.page.element == Element::e5m2;
    softmax.load_query(query_of(p, row, first_head), p.query.head_stride, heads);
    softmax.reset();
    // Addresses of the selected tokens in ascending order, as many at a time as the list holds.
    int64_t* offsets = reinterpret_cast<int64_t*>(list);
    const int32_t* blocks = p.block_table + row * p.blocks_per_row;
    const uint8_t* base = p.page.base + kv_head * p.page.head_stride;
    staged += warp * kStagedBytes;
    for (int round = 0;; round += kList) {
      auto address = [&](int token) {
        const int block = block_of_quad(p.page, token / kQuad);
        return __ldg(blocks + block) * int64_t(p.page.block_stride) + (token - block * p.page.block_size) * kRowBytes;
      };
      const int total = each_set_bit<kAttendThreads>(bitmap, words, sums, [&](int rank, int token) {
        if (uint32_t(rank - round) < uint32_t(kList)) offsets[rank - round] = token;
      });
      __syncthreads();
      const int here = min(total - round, kList);
      constexpr int kAhead = kStaged ? 4 : 1;  // tokens of a thread whose blocks it awaits together
      for (int first = threadIdx.x; first < here; first += kAhead * kAttendThreads) {
        int64_t at[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          at[i] = address(int(offsets[first + (first + i * kAttendThreads < here ? i * kAttendThreads : 0)]));
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + i * kAttendThreads < here) offsets[first + i * kAttendThreads] = at[i];
      }
      __syncthreads();
      for (int chunk = warp * kChunk; chunk < here; chunk += kAttendWarps * kChunk) {
        if constexpr (kStaged) {
          const int slots = min(here - chunk, kChunk);
          __syncwarp();
#pragma unroll
          for (int i = 0; i < kChunk * kPieces / 32; ++i) {
            const int at = i * 32 + threadIdx.x % 32, slot = at / kPieces, piece = at % kPieces * 16;
            if (slot >= slots) continue;
            const uint8_t* from = base + offsets[chunk + slot] + piece;
            const uint32_t to = uint32_t(__cvta_generic_to_shared(staged)) + slot * kStagedRow + piece;
            copy16(to, from);
            copy16(to + kChunk * kStagedRow, from + p.page.v_offset);
          }
          wait_for_copies();
          __syncwarp();
          softmax.template step<true>([&](int slot) { return staged + min(slot, slots - 1) * kStagedRow; },
                                      kChunk * kStagedRow, 0, slots, p.softmax_scale);
        } else {
          softmax.step([&](int slot) { return base + offsets[min(chunk + slot, here - 1)]; }, p.page.v_offset, 0,
                       here - chunk, p.softmax_scale);
        }
      }
      if (round + kList >= total) break;
      __syncthreads();
    }
    softmax.finish();
    softmax.template write_merged<kAttendWarps>(reinterpret_cast<float*>(memory + kSums), output_of(p, row, first_head),
                                                p.output.head_stride, heads, p.page.v_scale);
  }

  // The candidates of a set, the first kKept of them in shared memory.
  struct Candidates {
    const uint2* from;
    uint2* kept;

    __device__ Candidates(const DecodeParams& p, int set, uint32_t* bins)
        : from(p.work.candidates + int64_t(set) * p.capacity), kept(reinterpret_cast<uint2*>(bins + kSelectWords)) {}

    // How many of them to fetch before their number is known: a little more than encode aims at.
    static __device__ __forceinline__ int expected(const DecodeParams& p, const RowPlan& plan) {
      const int bits = p.sample_bits;
      const int64_t aim = int64_t(sample_rank(plan.need, 1 << bits, plan.length)) * plan.length * 5 / 4 >> bits;
      return (min(int(aim), kKept) + kAttendThreads - 1) / kAttendThreads * kAttendThreads;
    }

    __device__ __forceinline__ void fetch(int begin, int end) const {
#pragma unroll 4
      for (int i = begin + int(threadIdx.x); i < end; i += kAttendThreads)
        copy8(uint32_t(__cvta_generic_to_shared(kept + i)), from + i);
    }

    template <class Visit>
    __device__ __forceinline__ void each(int count, Visit visit) const {
#pragma unroll 4
      for (int i = threadIdx.x; i < min(count, kKept); i += kAttendThreads) visit(__uint_as_float(kept[i].x), kept[i].y);
#pragma unroll 1
      for (int i = kKept + int(threadIdx.x); i < count; i += kAttendThreads) {
        const uint2 x = from[i];
        visit(__uint_as_float(x.x), x.y);
      }
    }
  };

  // Equal steps of the score above the pivot.
  struct Bins {
    float pivot, scale;
    __device__ __forceinline__ int operator()(float x) const {
      return scale > 0 ? min(int(fmaxf(x - pivot, 0.0f) * scale), kBins - 1) : 0;
    }
  };

  // Selects among the candidates. One pass over the bins finds the one of the k-th best; its few members
  // are ranked one by one. bins: zero, and synchronised.
  static __device__ __forceinline__ void from_candidates(const Candidates& candidates, const RowPlan& plan, int count,
                                                         const Bins& bin_of, uint32_t* bins, uint32_t* bitmap) {
    candidates.each(count, [&](float score, uint32_t) { atomicAdd(bins + spread(bin_of(score)), 1u); });
    __syncthreads();
    const Bin edge = find_block_bin<kAttendThreads>(bins, plan.need);
    const int index = int(edge.index), wanted = int(plan.need - edge.before), size = int(edge.size);
    const int bits = token_bits(plan.length);
    uint64_t* members = reinterpret_cast<uint64_t*>(bins);
    uint32_t* num_members = bins + kBinWords + 20;
    if (threadIdx.x == 0) *num_members = 0;
    __syncthreads();
    candidates.each(count, [&](float score, uint32_t token) {
      const int bin = bin_of(score);
      if (bin > index || (bin == index && size == wanted)) set_bit(bitmap, token);
      else if (bin == index && size <= kMembers)
        members[atomicAdd(num_members, 1u)] = ranked(order_key(score), token, bits);
    });
    if (size == wanted) return;
    __syncthreads();
    if (size > kMembers) return among_many(candidates, count, bin_of, index, wanted, bits, bins, bitmap);
    for (int m = threadIdx.x; m < size; m += kAttendThreads) {
      const uint64_t mine = members[m];
      int better = 0;
      for (int i = 0; i < size; ++i) better += members[i] > mine;
      if (better < wanted) set_bit(bitmap, uint32_t(mine & ((1ull << bits) - 1)));
    }
  }

  // Radix selection in the edge bin. When its scores are all equal, only the tokens are left.
  static __device__ __noinline__ void among_many(Candidates candidates, int count, Bins bin_of, int index, int wanted,
                                                 int bits, uint32_t* bins, uint32_t* bitmap) {
    uint32_t* range = bins + kBinWords + 20;
    if (threadIdx.x == 0) range[0] = kFull, range[1] = 0;
    __syncthreads();
    candidates.each(count, [&](float score, uint32_t) {
      if (bin_of(score) == index) atomicMin(range, order_key(score)), atomicMax(range + 1, order_key(score));
    });
    __syncthreads();
    const uint32_t low = range[0], high = range[1];
    auto members = [&](auto visit) {
      candidates.each(count, [&](float score, uint32_t token) {
        if (bin_of(score) == index) visit(ranked(order_key(score) - low, token, bits), token);
      });
    };
    const uint64_t threshold =
        block_threshold<kAttendThreads>(bins, 32 - __clz(high - low) + bits, wanted,
                                        [&](auto visit) { members([&](uint64_t v, uint32_t) { visit(v); }); });
    members([&](uint64_t v, uint32_t token) {
      if (v >= threshold) set_bit(bitmap, token);
    });
  }

  static __device__ void from_scan(const DecodeParams& p, int row, int kv_head, int score_head,
                                   const RowPlan& plan, uint32_t* bins, uint32_t* bitmap) {
    switch (p.mode) {
      case Mode::dot:
        return select_from_scan<kAttendThreads, kWordChunks, Mode::dot>(p, row, kv_head, score_head, plan, bins, bitmap);
      case Mode::manhattan:
        return select_from_scan<kAttendThreads, kWordChunks, Mode::manhattan>(p, row, kv_head, score_head, plan, bins, bitmap);
      default:
        return select_from_scan<kAttendThreads, kWordChunks, Mode::manhattan_sum>(p, row, kv_head, 0, plan, bins, bitmap);
    }
  }

  // An equal run of the chunks of all dense rows.
  static __device__ void dense(const DecodeParams& p, int worker, uint8_t* memory) {
    int64_t* cum = reinterpret_cast<int64_t*>(memory);
    int* last = reinterpret_cast<int*>(cum + p.num_rows + 1);
    float* buffer = reinterpret_cast<float*>(memory + ((p.num_rows + 1) * 8 + 31) / 16 * 16);
    const int warp = threadIdx.x / 32, kv_heads = p.page.num_kv_heads;
    auto row_chunks = [&](const RowPlan& plan) {
      return plan.sparse || plan.length <= 0 ? 0 : (plan.length + kChunk - 1) / kChunk - plan.first / kChunk;
    };
    prefix_rows(cum, p.num_rows, [&](int row) { return int64_t(row_chunks(RowPlan(p, row))) * kv_heads; });
    // No more workers than chunks, so that each of them has one at least.
    const int64_t total = cum[p.num_rows], workers = min(int64_t(p.dense_workers), total);
    if (worker >= workers) return;
    int64_t at = total * worker / workers;
    const int64_t end = total * (worker + 1) / workers;
    wait_for_previous();
    while (at < end) {
      const int row = find_row(cum, p.num_rows, at);
      const RowPlan plan(p, row);
      const int chunks = row_chunks(plan);
      const int64_t in_row = at - cum[row];
      const int kv_head = int(in_row / chunks), first = int(in_row % chunks);
      const int count = int(min(end - at, int64_t(chunks - first)));
      const int64_t group = int64_t(row) * kv_heads + kv_head;

      Softmax softmax;
      softmax.e5m2 = p.page.element == Element::e5m2;
      softmax.load_query(query_of(p, row, kv_head * p.group), p.query.head_stride, p.group);
      softmax.reset();
      const int32_t* blocks = p.block_table + row * p.blocks_per_row;
      const uint8_t* base = p.page.base + kv_head * p.page.head_stride;
      for (int i = warp; i < count; i += kAttendWarps) {
        const int token = (plan.first / kChunk + first + i) * kChunk;
        const int block = block_of_quad(p.page, token / kQuad);
        const uint8_t* run = base + __ldg(blocks + block) * int64_t(p.page.block_stride) +
                             (token - block * p.page.block_size) * kRowBytes;
        const int last_slot = min(kChunk, plan.length - token) - 1, begin = max(plan.first - token, 0);
        softmax.step([&](int slot) { return run + min(max(slot, begin), last_slot) * kRowBytes; },
                     p.page.v_offset, begin, last_slot + 1, p.softmax_scale);
      }
      softmax.finish();
      T* output = output_of(p, row, kv_head * p.group);
      if (count == chunks) {
        softmax.template write_merged<kAttendWarps>(buffer, output, p.output.head_stride, p.group, p.page.v_scale);
      } else {
        // Workers [low, high] share this (row, KV head).
        const int64_t start = at - first;
        const int low = int(((start + 1) * workers + total - 1) / total) - 1;
        const int high = int(((start + chunks) * workers + total - 1) / total) - 1;
        softmax.template merge_warps<kAttendWarps>(buffer, p.group);
        if (warp == 0) {
          softmax.store(p.work.partials + (worker + group) * kStateFloats);
          __threadfence();
          __syncwarp();
          if (threadIdx.x == 0) *last = atomicAdd(p.work.arrived + group, 1u) == uint32_t(high - low);
        }
        __syncthreads();
        if (*last) {
          __threadfence();
          softmax.reset();
          for (int w = low + warp; w <= high; w += kAttendWarps)
            softmax.merge(p.work.partials + (w + group) * kStateFloats);
          softmax.template write_merged<kAttendWarps>(buffer, output, p.output.head_stride, p.group, p.page.v_scale);
        }
      }
      __syncthreads();
      at += count;
    }
  }
};

template <int D, class T, int kTiles, int kThreads, bool kFp8>
__global__ void __launch_bounds__(kThreads, D <= 128 && kTiles == 1 ? 512 / kThreads : 1)
    attend_kernel(const __grid_constant__ DecodeParams p, int sets) {
  extern __shared__ __align__(16) uint8_t attend_memory[];
  using Body = Attend<D, T, kTiles, kThreads, kFp8>;
  let_next_start();
  if (int(blockIdx.x) < sets) Body::sparse(p, blockIdx.x, attend_memory);
  if (int(blockIdx.x) >= p.dense_workers) return;
  bool dense = false;
  for (int row = threadIdx.x; row < p.num_rows; row += kThreads) {
    const RowPlan plan(p, row);
    dense |= plan.length > 0 && !plan.sparse;
  }
  if (__syncthreads_or(dense)) Body::dense(p, blockIdx.x, attend_memory);
}

// Few token sets get large blocks, many sets small ones that overlap selecting with attending.
template <int D>
void attend_head_size(const DecodeParams& p, void* stream) {
  const int sets = p.num_rows * p.score_heads_per_kv * p.page.num_kv_heads;
  auto launch_it = [&](auto element, auto tiles, auto threads, auto fp8) {
    using T = decltype(element);
    constexpr int kTiles = decltype(tiles)::value, kThreads = decltype(threads)::value;
    constexpr bool kFp8 = decltype(fp8)::value;
    launch(attend_kernel<D, T, kTiles, kThreads, kFp8>, dim3(std::max(sets, p.dense_workers)), kThreads,
           Attend<D, T, kTiles, kThreads, kFp8>::shared_bytes(p), stream, true, "attend", p, sets);
  };
  auto run = [&](auto element, auto tiles, auto threads) {
    if (p.page.fp8()) launch_it(element, tiles, threads, std::true_type());
    else launch_it(element, tiles, threads, std::false_type());
  };
  auto by_threads = [&](auto element) {
    using std::integral_constant;
    if (p.group > 8) return run(element, integral_constant<int, 2>(), integral_constant<int, 256>());
    if constexpr (D <= 128) {
      const int processors = num_multiprocessors();
      if (sets <= processors) return run(element, integral_constant<int, 1>(), integral_constant<int, 512>());
      if (sets > 4 * processors) return run(element, integral_constant<int, 1>(), integral_constant<int, 64>());
      if (sets > 2 * processors) return run(element, integral_constant<int, 1>(), integral_constant<int, 128>());
    }
    run(element, integral_constant<int, 1>(), integral_constant<int, 256>());
  };
  if (p.query.element == Element::bf16) by_threads(__nv_bfloat16());
  else by_threads(__half());
}

extern template void attend_head_size<64>(const DecodeParams&, void*);
extern template void attend_head_size<96>(const DecodeParams&, void*);
extern template void attend_head_size<128>(const DecodeParams&, void*);
extern template void attend_head_size<192>(const DecodeParams&, void*);
extern template void attend_head_size<256>(const DecodeParams&, void*);

}  // namespace adamas
