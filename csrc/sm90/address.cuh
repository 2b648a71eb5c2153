// Addresses of a step's vectors: the queries and outputs of a row, and the K rows of a context's tokens, which the
// block table scatters over the cache.
#pragma once
#include "sm90/memory.cuh"
#include "sm90/params.h"

namespace adamas {

// One head's vector of a query or output.
template <class T>
__device__ __forceinline__ T* head_vector(const Rows& rows, int row, int head) {
  return static_cast<T*>(rows.data) + row * rows.token_stride + head * rows.head_stride;
}

// The index of a token quad's entry in the block table: quad / q with q = block_size / 4, by multiplication with
// the magic number (2^32 + e) / q, e < q. The product is quad / q + quad * e / (q * 2^32). A quotient that is not
// an integer is at least 1 / q below the next integer, so rounding down is exact if quad * e < 2^32.
static_assert(uint64_t(kMaxContext / kQuad) * (kMaxBlock / kQuad) <= 1ull << 32);
__device__ __forceinline__ uint32_t block_index(uint32_t quad_magic, uint32_t quad) {
  return __umulhi(quad, quad_magic);
}
__device__ __forceinline__ int block_index(const Page& page, int quad) {
  return int(block_index(page.quad_magic, uint32_t(quad)));
}

// A row's entries of the block table.
__device__ __forceinline__ const int32_t* row_blocks(const DecodeParams& p, int row) {
  return p.block_table + row * p.blocks_per_row;
}

// The page of a KV head in block 0; those of other blocks are block_stride apart.
__device__ __forceinline__ const uint8_t* head_pages(const DecodeParams& p, int kv_head) {
  return p.page.base + kv_head * p.page.head_stride;
}

// Bytes from head_pages() to a token's K row; its V row is page.v_offset further. Takes one load from the block table.
template <int kRowBytes>
__device__ __forceinline__ int64_t key_offset(const Page& page, const int32_t* blocks, int token) {
  const int block = block_index(page, token / kQuad);
  return __ldg(blocks + block) * int64_t(page.block_stride) + (token - block * page.block_size) * kRowBytes;
}

}  // namespace adamas
