// Small helpers that every kernel uses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "sm90/params.h"

namespace adamas {

constexpr unsigned kFull = 0xffffffffu;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static const int value = [] {
    int device = 0, n = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&n, kAttribute, device), "cudaDeviceGetAttribute");
    return n;
  }();
  return value;
}

inline int num_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Shared memory in bytes that a block may have.
inline int max_block_memory() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// Blocks with so much shared memory that a multiprocessor holds at once; the hardware keeps 1 KiB of each.
inline int blocks_that_fit(int smem) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>() / (smem + 1024);
}

// With `overlap` the kernel may start before the one in front of it has finished; it calls
// wait_for_previous() before it reads what that one wrote.
template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, int threads, int smem, void* stream, bool overlap,
            const char* what, const Args&... args) {
  // One carve-out for every kernel, so that an SM need not drain before the next one starts.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), what);
  if (smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), what);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// A launch in clusters of `cluster` neighbours in x, each block with an SM's large share of memory. The
// kernel may start before the one in front of it has finished if it may `overlap`.
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  template <class Kernel>
  ClusterLaunch(Kernel kernel, dim3 grid, int cluster, int threads, int smem, void* stream, bool overlap,
                const char* what) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = overlap ? 2 : 1;
  }
};

template <class... Args>
void launch_clusters(void (*kernel)(Args...), dim3 grid, int cluster, int threads, int smem, void* stream,
                     bool overlap, const char* what, const Args&... args) {
  ClusterLaunch launch(kernel, grid, cluster, threads, smem, stream, overlap, what);
  check(cudaLaunchKernelEx(&launch.config, kernel, args...), what);
}

// Clusters that the device runs at once.
template <class... Args>
int count_clusters(void (*kernel)(Args...), int cluster, int threads, int smem, const char* what) {
  ClusterLaunch launch(kernel, dim3(cluster), cluster, threads, smem, nullptr, true, what);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), what);
  return count;
}

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" :::); }

// Brings a kernel's parameters into the constant cache; call it while there is nothing else to do.
template <class P>
__device__ __forceinline__ void touch(const P& p) {
  const auto* words = reinterpret_cast<const uint32_t*>(&p);
#pragma unroll
  for (int i = 0; i < int(sizeof(P) / 4); i += 16) asm volatile("" ::"r"(words[i]));
}

// Unsigned integers in the order of the floats; -0 and 0 are equal.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_order_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The next smaller float, from 0 past -0.
__device__ __forceinline__ float next_below(float x) {
  const uint32_t key = order_key(x);
  return from_order_key(key - (key == 0x80000000u ? 2 : 1));
}

__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }

// The same where neighbouring lanes ask for parts of a cache line: the whole line comes from memory.
__device__ __forceinline__ uint4 load16_line(const void* p) {
  uint4 x;
  asm("ld.global.nc.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
__device__ __forceinline__ uint2 load8_line(const void* p) {
  uint2 x;
  asm("ld.global.nc.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}
__device__ __forceinline__ uint2 load8(const void* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }

// Into the L2 cache, not waited for.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ uint4 shared16(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}
__device__ __forceinline__ uint2 shared8(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at));
  return x;
}
__device__ __forceinline__ uint4 shared16(const void* p) { return shared16(uint32_t(__cvta_generic_to_shared(p))); }
__device__ __forceinline__ uint2 shared8(const void* p) { return shared8(uint32_t(__cvta_generic_to_shared(p))); }
__device__ __forceinline__ uint32_t shared4(const void* p) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(uint32_t(__cvta_generic_to_shared(p))));
  return x;
}

// 16 bytes from global to shared memory, not waited for.
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 8 bytes, likewise.
__device__ __forceinline__ void copy8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Index of an element in shared memory when threads own runs of elements: one word of padding after
// every 32 keeps the runs' starts in different banks.
__host__ __device__ constexpr int spread(int i) { return i + i / 32; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(kFull, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, step));
  return x;
}

// The block of a token quad: quad / q with q = block_size / 4. The magic number is (2^32 + e) / q with e < q, so
// the product is quad / q + quad * e / (q * 2^32). A quotient lies 1 / q below the next integer at least, so that
// rounding it down is exact if quad * e < 2^32.
static_assert(uint64_t(kMaxContext / kQuad) * (kMaxBlock / kQuad) <= 1ull << 32);
__device__ __forceinline__ int block_of_quad(const Page& page, int quad) {
  return int(__umulhi(uint32_t(quad), page.quad_magic));
}

// Tokens of a row's context, whatever the caller wrote there.
template <class Params>
__device__ __forceinline__ int length_of(const Params& p, int row) {
  int length = p.seq_lens[row];
  // In this form, which costs attend no register more than none.
  if (uint32_t(length) > uint32_t(p.max_seq_len)) length = length < 0 ? 0 : p.max_seq_len;
  return length;
}

// Whether a row selects tokens, and how many of the middle (between sinks and recent window).
struct RowPlan {
  int length, first;  // tokens [first, length) are visible
  bool sparse;
  int budget, middle, need;

  __device__ RowPlan(const DecodeParams& p, int row) {
    length = length_of(p, row);
    budget = max(p.budgets ? p.budgets[row] : 0, p.least_budget);
    sparse = p.scores || (budget < length && p.sliding_window == 0);
    if (length <= 0) sparse = false;
    first = p.sliding_window > 0 ? max(0, length - p.sliding_window) : 0;
    middle = length - p.num_sink_tokens - p.recent_window;
    need = budget - p.num_sink_tokens - p.recent_window;
  }
};

// Adds a row to the counters; one thread per row.
__device__ __forceinline__ void count_row(const DecodeParams& p, const RowPlan& plan) {
  if (!p.stats || plan.length <= 0) return;
  auto* stats = reinterpret_cast<unsigned long long*>(p.stats);
  const int attended = plan.sparse ? plan.budget : plan.length - plan.first;
  atomicAdd(stats + (plan.sparse ? 0 : 1), 1ull);
  atomicAdd(stats + 2, (unsigned long long)(plan.length) * p.num_query_heads);
  atomicAdd(stats + 3, (unsigned long long)(attended) * p.num_query_heads);
}

// Exclusive prefix sums of the rows' work, in shared memory: cum[0..rows]. Every warp calls it with
// the same arguments; the first warp works.
template <class Work>
__device__ void prefix_rows(int64_t* cum, int rows, Work work) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    int64_t total = 0;
    for (int base = 0; base < rows; base += 32) {
      int64_t own = base + lane < rows ? work(base + lane) : 0, sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kFull, sum, step);
        if (lane >= step) sum += other;
      }
      if (base + lane < rows) cum[base + lane] = total + sum - own;
      total += __shfl_sync(kFull, sum, 31);
    }
    if (lane == 0) cum[rows] = total;
  }
  __syncthreads();
}

// The row that holds item `at`: the last one with cum[row] <= at.
__device__ __forceinline__ int find_row(const int64_t* cum, int rows, int64_t at) {
  int low = 0, high = rows;
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (cum[mid] <= at ? low : high) = mid;
  }
  return low;
}

}  // namespace adamas
