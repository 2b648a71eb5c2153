// The fused kernel's shape: the layout of a block's shared memory.
#include <algorithm>

#include "sm90/decode_fused/kernel.cuh"

namespace adamas {
namespace {

FusedShape fused_shape(const DecodeParams& p, int cluster) {
  const int sets = p.score_heads_per_kv, head_size = p.page.head_size, chunks = p.page.words <= 4 ? 1 : 2;
  FusedShape s{cluster, kFusedWarps / sets};
  s.set_magic = (255 + s.warps_per_set) / s.warps_per_set;
  s.stage = StageShape(p.page);
  s.stage_bytes = stage_bytes(p.page);
  const int64_t round = s.stage.tokens / kQuad * cluster;
  s.round_magic = uint32_t(((1ll << 32) + round - 1) / round);
  const int stages = (p.max_seq_len + s.stage.tokens - 1) / s.stage.tokens;
  // The padding lets heads start in different banks.
  s.score_stride = (stages + cluster - 1) / cluster * kStageTokens + 8;

  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    const int64_t start = at;
    at += (bytes + 15) / 16 * 16;
    return int(start);
  };
  s.states = kTokens * 4;
  const int candidates = kFusedWarps * kCandidates * 8, states = kFusedWarps * p.group * (head_size + 4) * 4;
  take(std::max(kFusedWarps * kFusedStages * s.stage_bytes, s.states + std::max(candidates, states)));
  s.scores = take(std::max(int64_t(sets) * s.score_stride * 4, int64_t(p.group) * chunks * 4 * 32 * 4));
  s.counts = take(sets * kEdgeWords * 4);
  s.copies = take(int64_t(cluster) * sets * kEdgeWords * 4);
  s.ranges = take(cluster * sets * sizeof(FusedRange));
  s.parts = take(kFusedWarps * 16);
  s.members = take(sets * kMembers * 8);
  s.planes = take(p.head_quads * kMaxQueryPlanes * chunks * 32 * 4);
  s.bias = take(4 * kMaxHeadQuads * 4);
  const bool summed = p.mode == Mode::dot_max;
  s.weights = take(summed ? 4 * kMaxHeadQuads * sizeof(HeadWeight) : 0);
  s.tops = take(summed ? 2 * 4 * kMaxHeadQuads * 4 : 0);
  s.partial = take((p.group * head_size + cluster * cluster) * 4);
  s.softmax = take(cluster * p.group * 8);
  s.barriers = take(kFusedWarps * kFusedStages * 8);
  s.heads = take(sets * sizeof(FusedHead));
  s.warps = take((kFusedWarps + 1) * 4);
  s.bytes = int(std::min(at, int64_t(INT32_MAX)));
  return s;
}

int run(const DecodeParams& p, const FusedShape& s, void* stream, bool count) {
  return p.page.head_size == 64 ? fused_head_size<64>(p, s, stream, count) : fused_head_size<128>(p, s, stream, count);
}

}  // namespace

bool fused_fits(const DecodeParams& p, int cluster) {
  if ((p.page.head_size != 64 && p.page.head_size != 128) || p.group > kFusedGroup) return false;
  return cluster > 0 && cluster <= kMaxCluster && fused_shape(p, cluster).bytes <= max_block_memory();
}

int fused_clusters(const DecodeParams& p, int cluster) {
  return fused_fits(p, cluster) ? run(p, fused_shape(p, cluster), nullptr, true) : 0;
}

void fused(const DecodeParams& p, int cluster, void* stream) { run(p, fused_shape(p, cluster), stream, false); }

}  // namespace adamas
