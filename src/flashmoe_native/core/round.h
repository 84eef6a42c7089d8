// Multiples of a unit.
#pragma once

#include <type_traits>

namespace flashmoe {

template <class T>
constexpr T round_down(T value, std::type_identity_t<T> unit) {
  return value / unit * unit;
}

template <class T>
constexpr T round_up(T value, std::type_identity_t<T> unit) {
  return round_down<T>(value + unit - 1, unit);
}

}  // namespace flashmoe
