#include "sm90/decode_split/attend.cuh"

namespace adamas {

template void attend_head_size<96>(const DecodeParams&, void*);

}  // namespace adamas
