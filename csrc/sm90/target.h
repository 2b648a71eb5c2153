// Which GPUs the library is built for: Hopper, or with ADAMAS_SM80 all others from sm_80 on. Both are built from the
// sources of csrc/sm90. What differs is chosen in four places: the scorer (score.cuh), the ring of stages
// (pipeline.cuh), the one-kernel form (csrc/sm80/fused.cu instead of decode_fused), and sizes that follow from kHopper.
#pragma once

namespace adamas {

#ifdef ADAMAS_SM80
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

}  // namespace adamas
