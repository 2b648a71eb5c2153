// attend, the last of the three kernels: computes the output from candidates.
//
// Each block first selects and attends for one (row, token set) (sparse.cuh). The first blocks then share the tokens
// of the dense rows as workers (sm90/dense.cuh). Which rows are dense depends on budgets on the device, so the grid is the
// same for every step of a shape.
#pragma once
#include <algorithm>

#include "sm90/dense.cuh"
#include "sm90/decode_split/sparse.cuh"
#include "sm90/launch.cuh"

namespace adamas {

template <int D, class T, int kTiles, int kThreads, bool kFp8>
__global__ void __launch_bounds__(kThreads, D <= 128 && kTiles == 1 ? 512 / kThreads : 1)
    attend_kernel(const __grid_constant__ DecodeParams p, int sets) {
  extern __shared__ __align__(16) uint8_t attend_memory[];
  using Shape = AttendShape<D, T, kTiles, kThreads, kFp8>;
  launch_dependents();
  if (int(blockIdx.x) < sets) attend_sparse<Shape>(p, blockIdx.x, attend_memory);
  if (int(blockIdx.x) >= p.dense_workers) return;
  if (any_dense_row(p))
    attend_dense<T, typename Shape::Softmax>(p, blockIdx.x, p.dense_workers, attend_memory, Shape::kWarps);
}

// Few token sets get large blocks. Many sets get small ones, some of which select while others attend. Blocks of 512
// threads would not fit the shared memory of other GPUs than Hopper.
template <int D>
void attend_head_size(const DecodeParams& p, void* stream) {
  const int sets = p.num_rows * p.score_heads_per_kv * p.page.num_kv_heads;
  auto launch_it = [&](auto element, auto tiles, auto threads, auto fp8) {
    using T = decltype(element);
    constexpr int kTiles = decltype(tiles)::value, kThreads = decltype(threads)::value;
    constexpr bool kFp8 = decltype(fp8)::value;
    launch(attend_kernel<D, T, kTiles, kThreads, kFp8>, dim3(std::max(sets, p.dense_workers)), kThreads,
           AttendShape<D, T, kTiles, kThreads, kFp8>::shared_bytes(p), stream, true, "attend", p, sets);
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
      if constexpr (kHopper) {
        if (sets <= processors) return run(element, integral_constant<int, 1>(), integral_constant<int, 512>());
        if (sets > 4 * processors) return run(element, integral_constant<int, 1>(), integral_constant<int, 64>());
      }
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
