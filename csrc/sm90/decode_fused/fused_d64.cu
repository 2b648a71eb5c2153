#include "sm90/decode_fused/kernel.cuh"

namespace adamas {

template int fused_head_size<64>(const DecodeParams&, const FusedShape&, void*, bool);

}  // namespace adamas
