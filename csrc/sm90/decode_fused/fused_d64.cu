#include "sm90/decode_fused/fused.cuh"

namespace adamas {

template int fused_head_size<64>(const DecodeParams&, const FusedShape&, void*, bool);

}  // namespace adamas
