#include "sm90/decode_split/attend.cuh"

namespace adamas {

template void attend_head_size<128>(const DecodeParams&, void*);

}  // namespace adamas
