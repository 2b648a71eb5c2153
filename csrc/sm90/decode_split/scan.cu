// The launch of scan.
#include "sm90/decode_split/scan.cuh"

#include "sm90/decode_split/dispatch.cuh"

namespace adamas {

void scan(const DecodeParams& p, void* stream) {
  if (p.positions) return scan_shared(p, stream);
  with_scan_types(p, [&](auto chunks, auto mode, auto quads) {
    constexpr int kChunks = decltype(chunks)::value, kQuads = decltype(quads)::value;
    constexpr Mode kMode = decltype(mode)::value;
    using Rows = OneRow<kChunks, kMode, kQuads>;
    if (p.scores) launch_scan<kChunks, kMode, kQuads, true, Rows>(p, stream);
    else launch_scan<kChunks, kMode, kQuads, false, Rows>(p, stream);
  });
}

}  // namespace adamas
