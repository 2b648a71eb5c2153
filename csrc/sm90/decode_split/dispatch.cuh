// Host: maps the parameters of a step to the template arguments of encode and scan.
#pragma once
#include <type_traits>

#include "sm90/params.h"

namespace adamas {

// Calls a kernel launcher with the template arguments that the parameters require.
template <class Launch>
void with_scan_types(const DecodeParams& p, Launch launch_it) {
  auto by_quads = [&](auto chunks, auto mode) {
    using std::integral_constant;
    if (mode() == Mode::manhattan_sum || p.head_quads == 1)
      return launch_it(chunks, mode, integral_constant<int, 1>());
    if constexpr (decltype(mode)::value != Mode::manhattan_sum) {
      if (p.head_quads == 2) return launch_it(chunks, mode, integral_constant<int, 2>());
      return launch_it(chunks, mode, integral_constant<int, 4>());
    }
  };
  auto by_mode = [&](auto chunks) {
    switch (p.mode) {
      case Mode::dot: return by_quads(chunks, std::integral_constant<Mode, Mode::dot>());
      case Mode::manhattan: return by_quads(chunks, std::integral_constant<Mode, Mode::manhattan>());
      case Mode::dot_max: return by_quads(chunks, std::integral_constant<Mode, Mode::dot_max>());
      default: return by_quads(chunks, std::integral_constant<Mode, Mode::manhattan_sum>());
    }
  };
  if (p.page.words <= 4) return by_mode(std::integral_constant<int, 1>());
  return by_mode(std::integral_constant<int, 2>());
}

}  // namespace adamas
