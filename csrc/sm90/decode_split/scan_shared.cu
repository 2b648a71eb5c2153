// The launch of the scan that takes the rows of a request together (shared.cuh).
#include "sm90/decode_split/scan.cuh"

namespace adamas {

bool scan_shares(const DecodeParams& p) { return p.mode == Mode::dot_max && p.group <= 8 && p.page.words <= 4; }

void scan_shared(const DecodeParams& p, void* stream) {
  if (p.group <= 4) launch_scan<1, Mode::dot_max, 2, false, SharedRows<2>>(p, stream);
  else launch_scan<1, Mode::dot_max, 4, false, SharedRows<4>>(p, stream);
}

}  // namespace adamas
