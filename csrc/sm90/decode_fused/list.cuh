// A warp's list of the tokens that may be selected, in the order of their indices.
//
// A token joins the list if its score reaches the pivot. When the list is nearly full, the pivot rises to a score that
// at least as many listed tokens reach as the round selects, and the others leave. A token that leaves, or never
// joins, is preceded by that many tokens of its own warp. So the list holds every token that the round may select,
// whatever the scores are and however many there are.
#pragma once
#include <cfloat>

#include "sm90/decode_fused/memory.cuh"
#include "sm90/order.cuh"

namespace adamas {

struct ListState {
  int count;
  float pivot;
};

// Drops tokens of a list: at least the `wanted` best ones stay, and at most (wanted + kList) / 2. Not inlined, because it
// would raise the register count of the loop.
inline __device__ __noinline__ ListState shorten_list(float* scores, uint16_t* indices, int count, int wanted) {
  constexpr int kPerLane = kList / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  const int enough = (wanted + kList) / 2;
  uint32_t key[kPerLane], low = kFull, high = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool here = i * 32 + lane < count;
    key[i] = here ? order_key(scores[i * 32 + lane]) : 0;
    low = here ? min(low, key[i]) : low, high = max(high, key[i]);
  }
  low = __reduce_min_sync(kFull, low), high = __reduce_max_sync(kFull, high) + 1;
  int reach = count;  // tokens that reach `low`; always as many as are wanted, and fewer reach `high`
  while (reach > enough && high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    int n = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) n += key[i] >= middle;
    n = __reduce_add_sync(kFull, n);
    if (n >= wanted) low = middle, reach = n;
    else high = middle;
  }
  // If the scores differ there are few enough now. Of equal ones the most recent stay.
  int drop = reach > enough ? reach - wanted : 0;
  int to = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = i * 32 + lane;
    const uint16_t index = at < count ? indices[at] : 0;
    const uint32_t equal = __ballot_sync(kFull, key[i] == low);
    const bool dropped = key[i] == low && __popc(equal & lower_lanes) < drop;
    const uint32_t stay = __ballot_sync(kFull, key[i] >= low && !dropped);
    if (stay >> lane & 1) {
      const int place = to + __popc(stay & lower_lanes);
      scores[place] = from_order_key(key[i]);
      indices[place] = index;
    }
    to += __popc(stay), drop = max(0, drop - __popc(equal));
    __syncwarp();
  }
  return {to, from_order_key(low)};
}

// A warp's list while it is filled.
struct TokenList {
  float* scores;
  uint16_t* indices;
  int count = 0, wanted;
  float pivot = -FLT_MAX;

  __device__ TokenList(const FusedMemory& m, int warp, int wanted)
      : scores(m.scores + warp * kList), indices(m.indices + warp * kList), wanted(wanted) {}

  // Adds a lane's tokens from `index` on whose scores reach the pivot; all lanes call it, in the order of their
  // indices. Tokens with score -inf never join.
  template <int kScores>
  __device__ __forceinline__ void add(const float (&score)[kScores], bool holds, int index) {
    const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
    bool joins[kScores];
    int before = 0, all = 0;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      joins[j] = holds && score[j] >= pivot;
      const uint32_t mask = __ballot_sync(kFull, joins[j]);
      before += __popc(mask & lower_lanes), all += __popc(mask);
    }
    int at = count + before;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      if (joins[j]) scores[at] = score[j], indices[at] = uint16_t(index + j);
      at += joins[j];
    }
    count += all;
  }

  // Makes room for another stage.
  __device__ __forceinline__ void make_room() {
    if (count <= kList - kStageTokens) return;
    const ListState state = shorten_list(scores, indices, count, wanted);
    count = state.count, pivot = state.pivot;
  }
};

}  // namespace adamas
