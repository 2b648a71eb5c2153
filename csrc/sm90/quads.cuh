// Signatures of token quads, and encoded queries, as the scorers of both targets take them (score.cuh).
#pragma once
#include <cstdint>
#include <type_traits>

#include "sm90/params.h"

namespace adamas {

// Products with the tokens of a quad that belong to the next head quad; on Hopper there are none.
struct NoProducts {};
struct QuadProducts {
  mutable int other[4];
};
using OtherProducts = std::conditional_t<kHopper, NoProducts, QuadProducts>;

// Signature words of one token quad: word c (and c + 4) of both planes, and the four scales. Lanes whose word is past
// the head size load word 0; their query planes are zero.
template <int kChunks, Mode kMode>
struct Signatures : OtherProducts {
  uint4 hi[kChunks], lo[kChunks];
  uint2 scale;
};

// A lane's four tokens as words: token i has hi[k][i] and lo[k][i].
template <int kChunks>
struct QuadWords {
  uint32_t hi[kChunks][4], lo[kChunks][4];

  template <Mode kMode>
  __device__ __forceinline__ explicit QuadWords(const Signatures<kChunks, kMode>& s) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      hi[k][0] = s.hi[k].x, hi[k][1] = s.hi[k].y, hi[k][2] = s.hi[k].z, hi[k][3] = s.hi[k].w;
      lo[k][0] = s.lo[k].x, lo[k][1] = s.lo[k].y, lo[k][2] = s.lo[k].z, lo[k][3] = s.lo[k].w;
    }
  }
};

}  // namespace adamas
