#include "decode.cuh"

namespace adamas {

template void attend_head_size<192>(const DecodeParams&, void*);

}  // namespace adamas
