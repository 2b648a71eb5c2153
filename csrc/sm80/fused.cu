// There is no one-kernel form on other GPUs than Hopper: steps run in three kernels.
#include <stdexcept>

#include "sm90/params.h"

namespace adamas {

bool fused_fits(const DecodeParams&, int, int) { return false; }

int fused_clusters(const DecodeParams&, int, int) { return 0; }

void fused(DecodeParams, int, int, void*) { throw std::logic_error("fused: these GPUs have no such kernel"); }

}  // namespace adamas
