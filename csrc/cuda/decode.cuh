// attend: from candidates to the output. Blocks in front: one per (row, token set), which selects
// and attends. Blocks behind: workers that share the tokens of the dense rows; the last worker of a
// (row, KV head) merges.
#pragma once
#include "attend.cuh"
#include "pipeline.cuh"
#include "scan.cuh"
#include "select.cuh"

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
        [&](int step) { return (warp + step * kAttendWarps) * 8 + lane / 4; }, [] {},
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
  static constexpr int kFirst = kAttendThreads <= 128 ? 8 : 4;  // candidates that a thread loads at once
  static constexpr int kSums = 16 * 4;
  static constexpr int kFrontBytes =
      kStaged && kAttendWarps * kStagedBytes > kSelectWords * 4 ? kAttendWarps * kStagedBytes : kSelectWords * 4;

  static __host__ __device__ int merge_bytes(const DecodeParams& p) {
    return kAttendWarps * (p.group < 8 ? p.group : 8) * Softmax::kHeadFloats * 4;
  }

  static int shared_bytes(const DecodeParams& p) {
    const int list = kList * 8, merge = merge_bytes(p);
    const int bitmap = bitmap_words(p.max_context_len) * 4, rows = (p.num_rows + 1) * 8;
    const int front = kSums + kFrontBytes + (list > merge ? list : merge) + bitmap, back = rows + 16 + merge;
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
    const RowPlan plan(p, row);
    if (plan.length <= 0) {
      for (int h = 0; h < heads; ++h)
        for (int i = threadIdx.x; i < D; i += kAttendThreads) output_of(p, row, first_head + h)[i] = T(0.0f);
      return;
    }
    if (!plan.sparse) return;

    uint32_t* sums = reinterpret_cast<uint32_t*>(memory);
    uint8_t* staged = memory + kSums;  // where the bins are
    uint32_t* bins = reinterpret_cast<uint32_t*>(staged);
    uint8_t* list = staged + kFrontBytes;
    const int list_bytes = max(kList * 8, merge_bytes(p));
    uint32_t* bitmap = reinterpret_cast<uint32_t*>(list + list_bytes);
    const int words = (plan.length + 31) / 32;
    for (int w = threadIdx.x; w < words; w += kAttendThreads)
      bitmap[spread(w)] = range_bits(w, 0, p.num_sink_tokens) | range_bits(w, plan.length - p.recent_window, plan.length);
    for (int i = threadIdx.x; i < kBinWords; i += kAttendThreads) bins[i] = 0;
    __syncthreads();

    wait_for_previous();
    if (plan.need > 0) {
      uint2 first[kFirst];  // on their way while their number is
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        const int at = threadIdx.x + i * kAttendThreads;
        first[i] = p.work.candidates[int64_t(set) * p.capacity + min(at, p.capacity - 1)];
      }
      const uint32_t count = p.work.count[set];
      const float pivot = p.work.pivot_score[set], scale = p.work.pivot_scale[set];
      if (count >= uint32_t(plan.need) && count <= uint32_t(p.capacity))
        from_candidates(p, set, plan, int(count), pivot, scale, first, bins, bitmap);
      else
        from_scan(p, row, kv_head, score_head, plan, bins, bitmap);
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
        if (uint32_t(rank - round) < uint32_t(kList)) offsets[rank - round] = kStaged ? token : address(token);
      });
      __syncthreads();
      const int here = min(total - round, kList);
      if constexpr (kStaged) {  // a thread of a small block has several tokens, whose blocks it awaits together
        constexpr int kAhead = 4;
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
      }
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
    softmax.template write_merged<kAttendWarps>(reinterpret_cast<float*>(list), output_of(p, row, first_head),
                                                p.output.head_stride, heads, p.page.v_scale);
  }

  // Selects among the candidates. One pass over equal steps of the score above the pivot finds the
  // bin of the k-th best; its few members are ranked one by one. bins: zero, and synchronised.
  // first: this thread's first candidates, whether they exist or not.
  static __device__ void from_candidates(const DecodeParams& p, int set, const RowPlan& plan, int count,
                                         float pivot, float scale, const uint2 (&first)[kFirst], uint32_t* bins,
                                         uint32_t* bitmap) {
    const uint2* from = p.work.candidates + int64_t(set) * p.capacity;
    auto each = [&](auto visit) {
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        const int at = threadIdx.x + i * kAttendThreads;
        if (at < count) visit(__uint_as_float(first[i].x), first[i].y, at);
      }
      constexpr int kAhead = 4;  // loads that are waited for together
      for (int base = threadIdx.x + kFirst * kAttendThreads; base < count; base += kAhead * kAttendThreads) {
        uint2 entry[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (base + i * kAttendThreads < count) entry[i] = from[base + i * kAttendThreads];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (base + i * kAttendThreads < count) visit(__uint_as_float(entry[i].x), entry[i].y, base + i * kAttendThreads);
      }
    };
    auto bin_of = [&](float x) { return scale > 0 ? min(int(fmaxf(x - pivot, 0.0f) * scale), kBins - 1) : 0; };
    each([&](float score, uint32_t, int) { atomicAdd(bins + spread(bin_of(score)), 1u); });
    __syncthreads();
    const Bin edge = find_block_bin<kAttendThreads>(bins, plan.need);
    const uint32_t wanted = plan.need - edge.before;  // of the members of the edge bin
    auto choose = [&](uint32_t token) { set_bit(bitmap, token); };
    const int bits = token_bits(plan.length);
    auto value = [&](float score, uint32_t token) { return ranked(order_key(score), token, bits); };
    if (edge.size > 32 && edge.size != wanted) {
      // Radix selection in the edge bin. When its scores are all equal, only the tokens are left.
      uint32_t* range = bins + kBinWords + 20;
      if (threadIdx.x == 0) range[0] = kFull, range[1] = 0;
      __syncthreads();
      each([&](float score, uint32_t token, int) {
        const int bin = bin_of(score);
        if (bin > int(edge.index)) choose(token);
        if (bin != int(edge.index)) return;
        atomicMin(range, order_key(score));
        atomicMax(range + 1, order_key(score));
      });
      __syncthreads();
      const uint32_t low = range[0], high = range[1];
      auto members = [&](auto visit) {
        each([&](float score, uint32_t token, int) {
          if (bin_of(score) == int(edge.index)) visit(ranked(order_key(score) - low, token, bits), token);
        });
      };
      const uint64_t threshold = block_threshold<kAttendThreads>(
          bins, 32 - __clz(high - low) + bits, wanted,
          [&](auto visit) { members([&](uint64_t v, uint32_t) { visit(v); }); });
      members([&](uint64_t v, uint32_t token) {
        if (v >= threshold) choose(token);
      });
      return;
    }
    uint32_t* members = bins + kBinWords + 20;  // their number; the indices go to the first bins
    if (threadIdx.x == 0) *members = 0;
    __syncthreads();
    each([&](float score, uint32_t token, int i) {
      const int bin = bin_of(score);
      if (bin > int(edge.index) || (bin == int(edge.index) && edge.size == wanted)) choose(token);
      else if (bin == int(edge.index)) bins[atomicAdd(members, 1u)] = i;
    });
    if (edge.size == wanted) return;
    __syncthreads();
    if (threadIdx.x < 32) {
      const bool here = threadIdx.x < edge.size;
      const uint2 own = here ? from[bins[threadIdx.x]] : uint2{};
      const uint64_t mine = here ? value(__uint_as_float(own.x), own.y) : 0;
      uint32_t better = 0;
      for (int i = 0; i < int(edge.size); ++i) better += __shfl_sync(kFull, mine, i) > mine;
      if (here && better < wanted) choose(own.y);
    }
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
