#include "sm90/decode_split/attend.cuh"

namespace adamas {

template void attend_head_size<256>(const DecodeParams&, void*);

}  // namespace adamas
