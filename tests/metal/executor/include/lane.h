// What a kernel running in the executor asks of it: arguments, its place in the grid, threadgroup
// memory, operations that involve other lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace msl {

// Where in the sources an operation stands.
struct Site {
  int line;
#ifdef __clang__
  int column;
  static constexpr Site current(int line = __builtin_LINE(), int column = __builtin_COLUMN()) {
    return {line, column};
  }
  friend bool operator==(Site a, Site b) { return a.line == b.line && a.column == b.column; }
#else
  static constexpr Site current(int line = __builtin_LINE()) { return {line}; }
  friend bool operator==(Site a, Site b) { return a.line == b.line; }
#endif
};

float simd_sum(float value, Site site);
float simd_max(float value, Site site);
unsigned simd_min(unsigned value, Site site);
float simd_shuffle_xor(float value, unsigned mask, Site site);
void simdgroup_barrier(Site site);
void threadgroup_barrier(Site site);

// `index[n]` is n: the attributes' brackets have to close something.
struct Index {
  constexpr int operator[](int n) const { return n; }
};
inline constexpr Index index{};

// The struct that is bound; ends the dispatch with an error where it has fewer than `size` bytes.
const void* arguments(size_t size);

struct Argument {
  template <class T>
  operator const T&() const {
    return *static_cast<const T*>(arguments(sizeof(T)));
  }
};
struct Bound {
  constexpr Argument operator[](int) const { return {}; }
};
inline constexpr Bound bound{};

enum Quantity { kPositionInGrid, kGroupInGrid, kIndexInGroup, kSimdgroup, kLane };
unsigned place(int quantity, int axis);

struct Coordinate {
  int quantity;
  operator unsigned() const { return place(quantity, 0); }
  template <class Vector, class = decltype(Vector::z)>
  operator Vector() const {
    return {place(quantity, 0), place(quantity, 1), place(quantity, 2)};
  }
};
struct Geometry {
  constexpr Coordinate operator[](int quantity) const { return {quantity}; }
};
inline constexpr Geometry geometry{};

unsigned function_constant(int at);
template <int at>
struct FunctionConstant {
  operator unsigned() const { return function_constant(at); }
};

// Fills threadgroup memory that this threadgroup has not touched yet with NaNs. `group` is the
// number of the threadgroup that touched it last.
void enter_threadgroup_memory(void* data, size_t size, uint64_t* group);

template <class Array>
class ThreadgroupArray {
 public:
  Array& here() {
    enter_threadgroup_memory(&array_, sizeof array_, &group_);
    return array_;
  }

 private:
  alignas(16) Array array_;
  uint64_t group_ = 0;
};

// The library's kernels, up to one without a name.
struct Kernel {
  const char* name;
  unsigned threads;  // of a threadgroup, at most
  void (*run)();
};
extern const Kernel kernels[];

}  // namespace msl
