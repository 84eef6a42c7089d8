// Runs the project's Metal kernels on the CPU: the .metal files are compiled as C++ into one shared
// library with this interface. One fibre is one GPU thread; lanes, simdgroups and threadgroups run
// in an order shuffled by a seed; threadgroup memory is poisoned before every threadgroup.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum { kExecutorConstants = 16 };

struct ExecutorDispatch {
  const char* kernel;
  uint32_t threadgroups[3];  // per grid
  uint32_t threads[3];       // per threadgroup; at most 1024 in all
  const void* arguments;     // the kernel's struct, at index 0; null: nothing is bound
  uint64_t arguments_length;
  uint32_t constants[kExecutorConstants];  // function constants, all of type uint
  uint32_t constants_set;                  // bit i: constant i has a value
  uint32_t seed;                           // of the shuffles; 0: in order
  uint32_t used_constants;                 // out: bit i: the kernel read constant i
};

// Runs a dispatch to its end. Returns null, or what is wrong with it, which stays readable until
// the thread's next call:
// - no such kernel, an empty grid, more threads in a threadgroup than the kernel allows;
// - its struct is unbound or shorter than it is; a function constant that it reads has no value;
// - a threadgroup barrier that not every thread reaches, a simdgroup operation that not every lane
//   reaches, or several of them reached at once;
// - more than 32 KiB of threadgroup memory;
// - a read or write that faults (outside memory made by executor_allocate) or is misaligned.
// Dispatches of several threads take turns.
const char* executor_run(ExecutorDispatch* dispatch);

// The most threads that a threadgroup of the kernel may have; 0 if the library has no such kernel.
uint32_t executor_threads(const char* kernel);

// `length` bytes, 16-byte aligned (page-aligned if `length` is a multiple of a page), zeroed; an
// unreadable page follows the last one, with less than 16 bytes between, and another precedes it.
void* executor_allocate(uint64_t length);
// Returns null, or that the bytes between the end and the guard page were written.
const char* executor_free(void* data);
}
