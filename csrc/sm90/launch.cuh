// Host: errors, device limits, and launches of blocks or clusters that may overlap with the preceding kernel of the
// stream (programmatic dependent launch, from sm_90 on; on older GPUs a kernel starts when the preceding one has ended).
// Device: the instructions that start and end such an overlap.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace adamas {

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

// Whether kernels may overlap with the preceding one.
inline bool has_dependent_launch() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9; }

// Maximum shared memory of a block in bytes.
inline int max_block_memory() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// Blocks with `smem` bytes of shared memory that fit a multiprocessor at once; the hardware reserves 1 KiB per block.
inline int blocks_that_fit(int smem) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>() / (smem + 1024);
}

// With `overlap` the kernel may start before the preceding one has finished. It must then call
// wait_for_preceding_kernel() before it reads what that one wrote.
template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, int threads, int smem, void* stream, bool overlap,
            const char* what, const Args&... args) {
  // The same carve-out for every kernel, because an SM drains before it changes the carve-out.
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
  config.numAttrs = overlap && has_dependent_launch() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// A launch in clusters of `cluster` blocks that are neighbours in x. `overlap` is as in launch().
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

// Returns when the preceding kernel has finished and its writes are visible.
__device__ __forceinline__ void wait_for_preceding_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start once every block has called this or exited.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

// Loads a kernel's parameters into the constant cache. A miss there costs about as much as one in L2, so call this
// where the kernel waits anyway.
template <class P>
__device__ __forceinline__ void prefetch_params(const P& p) {
  const auto* words = reinterpret_cast<const uint32_t*>(&p);
#pragma unroll
  for (int i = 0; i < int(sizeof(P) / 4); i += 16) asm volatile("" ::"r"(words[i]));
}

}  // namespace adamas
