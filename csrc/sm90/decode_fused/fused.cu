// The fused kernel's shape: the layout of a block's shared memory.
#include <algorithm>

#include "sm90/decode_fused/kernel.cuh"

namespace adamas {
namespace {

FusedShape fused_shape(const DecodeParams& p, int cluster, int warps) {
  const int head_size = p.page.head_size, chunks = p.page.words <= 4 ? 1 : 2;
  FusedShape s{cluster, warps, stage_bytes(p.page), StageShape(p.page)};
  s.stride = warps * cluster * s.stage.tokens;
  s.stride_blocks = s.stride / p.page.block_size, s.stride_rest = s.stride % p.page.block_size;
  int at = 0;
  auto take = [&](int bytes) {
    const int start = at;
    at += (bytes + 15) / 16 * 16;
    return start;
  };
  s.states = kMostWanted * 4;
  const int states = warps * p.group * (head_size + 4) * 4;
  take(std::max(warps * kFusedStages * s.stage_bytes, s.states + states));
  s.scores = take(std::max(warps * kList * 4, p.group * chunks * 4 * 32 * 4));
  s.indices = take(warps * kList * 2);
  s.counts = take(kEdgeWords * 4);
  s.copies = take(cluster * kEdgeWords * 4);
  s.ranges = take(cluster * int(sizeof(FusedRange)));
  s.posts = take(warps * 4);
  s.parts = take((warps + cluster) * 16);
  s.members = take(kMembers * 8);
  s.planes = take(p.head_quads * kMaxQueryPlanes * chunks * 32 * 4);
  s.bias = take(4 * kMaxHeadQuads * 4);
  const bool summed = p.mode == Mode::dot_max;
  s.weights = take(summed ? 4 * kMaxHeadQuads * int(sizeof(HeadWeight)) : 0);
  s.tops = take(summed ? 2 * 4 * kMaxHeadQuads * 4 : 0);
  s.partial = take((p.group * head_size + cluster * cluster) * 4);
  s.softmax = take(cluster * p.group * 8);
  s.barriers = take(warps * kFusedStages * 8);
  s.search = take(sizeof(FusedSearch));
  s.warps = take(warps * 4);
  s.sampled = take(summed ? kSampledBins * 4 : 0);
  s.bytes = at;
  return s;
}

int run(const DecodeParams& p, const FusedShape& s, void* stream, bool count) {
  return p.page.head_size == 64 ? fused_head_size<64>(p, s, stream, count) : fused_head_size<128>(p, s, stream, count);
}

}  // namespace

bool fused_fits(const DecodeParams& p, int cluster, int warps) {
  if ((p.page.head_size != 64 && p.page.head_size != 128) || p.group > kFusedGroup) return false;
  if (p.num_rows * p.page.num_kv_heads > kTickets) return false;
  if (p.score_heads_per_kv > 1 || cluster <= 0 || cluster > kMaxCluster) return false;
  if (warps != kLeastWarps && warps != kMostWarps) return false;
  const FusedShape s = fused_shape(p, cluster, warps);
  const int64_t indexed = int64_t(s.stage.tokens) * warps * cluster * ((1 << 16) / kStageTokens);
  return p.max_seq_len <= indexed && s.bytes <= max_block_memory();
}

int fused_clusters(const DecodeParams& p, int cluster, int warps) {
  return fused_fits(p, cluster, warps) ? run(p, fused_shape(p, cluster, warps), nullptr, true) : 0;
}

void fused(DecodeParams p, int cluster, int warps, void* stream) {
  p.work.arrived = p.work.tickets;
  run(p, fused_shape(p, cluster, warps), stream, false);
}

}  // namespace adamas
