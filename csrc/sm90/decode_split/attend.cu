// The launch of attend, and the workspace of the three kernels.
#include "sm90/decode_split/attend.cuh"

namespace adamas {

void attend(const DecodeParams& p, void* stream) {
  switch (p.page.head_size) {
    case 64: return attend_head_size<64>(p, stream);
    case 96: return attend_head_size<96>(p, stream);
    case 128: return attend_head_size<128>(p, stream);
    case 192: return attend_head_size<192>(p, stream);
    case 256: return attend_head_size<256>(p, stream);
  }
}

int64_t workspace(DecodeParams& p, uint8_t* base) {
  const int64_t groups = int64_t(p.num_rows) * p.page.num_kv_heads, sets = groups * p.score_heads_per_kv;
  const int chunks = p.page.words <= 4 ? 1 : 2;
  const int state_floats = 32 * ((p.group <= 8 ? 1 : 2) * (p.page.head_size / 4 + 4));
  p.dense_workers = 2 * num_multiprocessors();
  int64_t at = 0;
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + at);
    at += (count * int64_t(sizeof(*pointer)) + 127) / 128 * 128;
  };
  take(p.work.tickets, kTickets);  // first, so that no other step has anything else there
  take(p.work.planes, groups * p.head_quads * query_planes(p.mode) * chunks * 32);
  take(p.work.bias, groups * p.head_quads * 4);
  take(p.work.bytes, kHopper && scan_shares(p) ? groups * p.head_quads * kByteWords * chunks * 16 : 0);
  take(p.work.weights, p.mode == Mode::dot_max ? groups * p.head_quads * 4 : 0);
  take(p.work.pivot_score, sets);
  take(p.work.pivot_token, sets);
  take(p.work.pivot_scale, sets);
  take(p.work.count, sets);
  take(p.work.arrived, groups);
  take(p.work.pieces, 1);
  take(p.work.candidates, sets * p.capacity);
  take(p.work.partials, (p.dense_workers + groups) * state_floats);
  return at;
}

}  // namespace adamas
