#include "sm90/decode_split/attend.cuh"

namespace adamas {

template void attend_head_size<192>(const DecodeParams&, void*);

}  // namespace adamas
