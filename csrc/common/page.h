// The page: one block of one KV head, a dense run of bytes (vllm_adamas/layout.py owns the offsets).
#pragma once
#include <cstdint>

#include "common/element.h"

namespace adamas {

// Signature planes consist of tiles of 16 tokens: uint32 [S/32 words][16 tokens], S the dimensions of a signature.
constexpr int kTile = 16;
constexpr int kWord = 32;

// Dimensions of the signature of a head: zeros pad a head that is not whole words to a power of two.
constexpr int coded_size(int head_size) {
  if (head_size % kWord == 0) return head_size;
  int size = kWord;
  while (size < head_size) size *= 2;
  return size;
}

// Offsets of the planes in bytes from the start of the page (K is at 0), and the element of K and V. Each device
// adds how it locates a page and a token.
struct PageLayout {
  int64_t v_offset, hi_offset, lo_offset, scale_offset;
  Element element;
  float k_scale, v_scale;  // factors from stored to real values; 1 unless fp8

  ADAMAS_BOTH bool fp8() const { return is_fp8(element); }
};

}  // namespace adamas
