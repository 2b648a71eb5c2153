// A warp's list of the tokens that may be selected, in the order of their indices (FusedBlock::token).
//
// As long as the warp's tokens fit, they all have a place, which is their index. When they no longer do, the list becomes
// indexed: tokens below its pivot leave, and only tokens that reach it join, with their indices. At least as many tokens
// as the round selects reach a pivot, so the list holds every token that the round may select, whatever the scores are
// and however many there are. Tokens that must not be selected have score -inf.
//
// A pivot comes from all warps of the block: each posts a score that its share of the wanted tokens reach, and the least
// of these scores is reached by as many as are wanted. If that leaves the list too full, because the warps' scores differ
// or are equal, the pivot rises to a score that enough tokens of the list itself reach. Where the sample suggests a range
// (range.cuh), its low end is the first pivot: a guess, which counting confirms.
#pragma once
#include <cfloat>
#include <climits>

#include "sm90/decode_fused/memory.cuh"
#include "sm90/order.cuh"

namespace adamas {

struct ListState {
  int count = 0;  // places in use
  float pivot = -FLT_MAX;
  bool indexed = false;
};

// Keeps the listed tokens whose score stays(score), in their order, all with their indices. Returns their number.
template <class Stays>
__device__ __forceinline__ int keep_if(Stays stays, float* scores, uint16_t* indices, const ListState& list) {
  const int lane = threadIdx.x % 32;
  int to = 0;
#pragma unroll 1
  for (int first = 0; first < list.count; first += 32 * 4) {
    const int at = first + lane * 4;
    float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    if (at < list.count) x = *reinterpret_cast<const float4*>(scores + at);
    const float score[4] = {x.x, x.y, x.z, x.w};
    uint32_t masks[4], all = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      masks[j] = __ballot_sync(kFull, at + j < list.count && stays(score[j]));
      all |= masks[j];
    }
    if (!all) continue;
    ushort4 own = make_ushort4(at, at + 1, at + 2, at + 3);
    if (list.indexed && at < list.count) own = *reinterpret_cast<const ushort4*>(indices + at);
    const uint16_t index[4] = {own.x, own.y, own.z, own.w};
    __syncwarp();  // every lane has read its places
    int place = to;
#pragma unroll
    for (int j = 0; j < 4; ++j) place += __popc(masks[j] & ((1u << lane) - 1)), to += __popc(masks[j]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (masks[j] >> lane & 1) scores[place] = score[j], indices[place] = index[j], ++place;
  }
  __syncwarp();
  return to;
}

__device__ __forceinline__ int keep_from(float low, float* scores, uint16_t* indices, const ListState& list) {
  return keep_if([=](float x) { return x >= low; }, scores, indices, list);
}

// Makes room in a list that is nearly full. The best `wanted` tokens that reach its pivot stay; at most
// (wanted + kList) / 2 tokens do. Not inlined, because it would raise the register count of the loop.
inline __device__ __noinline__ ListState shorten_list(float* scores, uint16_t* indices, ListState list, int wanted) {
  constexpr int kPerLane = kList / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  const int enough = (wanted + kList) / 2;
  list = {keep_from(list.pivot, scores, indices, list), list.pivot, true};
  if (list.count <= enough) return list;
  uint32_t key[kPerLane], low = kFull, high = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool here = i * 32 + lane < list.count;
    key[i] = here ? order_key(scores[i * 32 + lane]) : 0;
    low = here ? min(low, key[i]) : low, high = max(high, key[i]);
  }
  __syncwarp();  // every lane has read its scores
  low = __reduce_min_sync(kFull, low), high = __reduce_max_sync(kFull, high) + 1;
  int reach = list.count;  // tokens that reach `low`; always as many as are wanted, and fewer reach `high`
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
    const uint16_t index = at < list.count ? indices[at] : 0;
    const uint32_t equal = __ballot_sync(kFull, key[i] == low);
    const bool dropped = key[i] == low && __popc(equal & lower_lanes) < drop;
    const uint32_t stay = __ballot_sync(kFull, key[i] >= low && !dropped);
    __syncwarp();  // every lane has read its index
    if (stay >> lane & 1) {
      const int place = to + __popc(stay & lower_lanes);
      scores[place] = from_order_key(key[i]);
      indices[place] = index;
    }
    to += __popc(stay), drop = max(0, drop - __popc(equal));
    __syncwarp();
  }
  return {to, from_order_key(low), true};
}

// The largest scores of 32 * kPerLane groups of the listed tokens.
template <int kPerLane>
struct GroupTops {
  float top[kPerLane];

  __device__ __forceinline__ GroupTops(const float* scores, int count) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) top[j] = -INFINITY;
#pragma unroll 1
    for (int first = threadIdx.x % 32; first < count; first += 32 * kPerLane)
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (first + j * 32 < count) top[j] = fmaxf(top[j], scores[first + j * 32]);
  }

  // An order key that `groups` of them reach, or 0 if there are fewer tokens; its upper half suffices.
  __device__ __forceinline__ uint32_t reached_by(int groups) const {
    uint32_t reached = 0;
#pragma unroll
    for (uint32_t bit = 1u << 31; bit > 0xffff; bit /= 2) {
      const uint32_t key = reached | bit;
      int number = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) number += __popc(__ballot_sync(kFull, order_key(top[j]) >= key));
      if (number >= groups) reached = key;
    }
    return reached > order_key(-FLT_MAX) ? reached : 0;
  }
};

// Posts an order key that `share` of the warp's tokens reach, or 0; returns the pivot that follows from all posts, or
// the present one if it is higher. posts: [warps].
inline __device__ __noinline__ float post_pivot(const float* scores, int count, float pivot, int share,
                                                uint32_t* posts, int warps, int warp) {
  const int lane = threadIdx.x % 32;
  const uint32_t reached = GroupTops<4>(scores, count).reached_by(share);
  if (lane == 0) atomicMax(posts + warp, reached);
  __syncwarp();
  // Other warps may post meanwhile: an atomic operation reads, too.
  const uint32_t least = __reduce_min_sync(kFull, lane < warps ? atomicOr(posts + lane, 0u) : uint32_t(kFull));
  return least ? fmaxf(pivot, from_order_key(least)) : pivot;
}

// A warp's list while it is filled. `fits`: all of the warp's tokens have a place.
struct TokenList {
  const FusedMemory& m;
  float* scores;
  uint16_t* indices;
  const int warp, warps, wanted;
  int most, next_post;  // tokens that leave room for another stage, and the index of the stage after which the warp posts
  ListState state;

  __device__ TokenList(const FusedMemory& m, int warp, int warps, int wanted, bool fits, const ListState& start)
      : m(m), scores(m.scores + warp * kList), indices(m.indices + warp * kList), warp(warp), warps(warps),
        wanted(wanted), most(fits ? INT_MAX : kList - kStageTokens), next_post(fits ? INT_MAX : post_after(kFirstPost)),
        state(start) {}

  // Takes the tokens of kSteps steps, of each the kScores neighbouring ones of a lane that `holds` any. The first of a step
  // has index `index`, and `step` more in each further step. All lanes call it, in the order of their indices.
  template <int kSteps, int kScores>
  __device__ __forceinline__ void take(const float (&score)[kSteps][kScores], bool holds, int index, int step) {
    if (state.indexed) {
      join(score, holds, index, step);
    } else if (holds) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        float* to = scores + index + i * step;
        if constexpr (kScores == 4)
          *reinterpret_cast<float4*>(to) = make_float4(score[i][0], score[i][1], score[i][2], score[i][3]);
        else
          for (int j = 0; j < kScores; ++j) to[j] = score[i][j];
      }
    }
  }

  // Ends the stage that has `index`, one of any lane, and makes room for another.
  __device__ __forceinline__ void end_stage(int index) {
    if (!state.indexed) state.count += kStageTokens;
    if (state.count <= most && index < next_post) return;
    state.pivot = post_pivot(scores, state.count, state.pivot, (wanted + warps - 1) / warps, m.posts, warps, warp);
    if (index >= next_post) next_post = post_after(2 * (next_post / kStageTokens + 1));
    if (state.count > most) state = shorten_list(scores, indices, state, wanted);
  }

 private:
  static constexpr int kFirstPost = 8;
  static constexpr int post_after(int stages) { return (stages - 1) * kStageTokens; }

  template <int kSteps, int kScores>
  __device__ __forceinline__ void join(const float (&score)[kSteps][kScores], bool holds, int index, int step) {
    const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
    float best = score[0][0];
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < kScores; ++j) best = fmaxf(best, score[i][j]);
    if (!__any_sync(kFull, holds && best >= state.pivot)) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      bool joins[kScores];
      int before = 0, all = 0;
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        joins[j] = holds && score[i][j] >= state.pivot;
        const uint32_t mask = __ballot_sync(kFull, joins[j]);
        before += __popc(mask & lower_lanes), all += __popc(mask);
      }
      int at = state.count + before;
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        if (joins[j]) scores[at] = score[i][j], indices[at] = uint16_t(index + i * step + j);
        at += joins[j];
      }
      state.count += all;
    }
  }
};

}  // namespace adamas
