// Coroutines with stacks of their own: enough to run each GPU thread until it waits for others.
#pragma once

#include <cstddef>
#if !defined(__x86_64__) || defined(EXECUTOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace msl {

class Fibre {
 public:
  // Prepares entry() to run on the stack; it must not return.
  void start(char* stack, size_t bytes, void (*entry)());
  // From the scheduler: runs the fibre until it yields. From the fibre: yields to the scheduler.
  void resume();
  void yield();

 private:
#if !defined(__x86_64__) || defined(EXECUTOR_UCONTEXT)
  ucontext_t mine_, scheduler_;
#else
  void* mine_;
  void* scheduler_;
#endif
};

}  // namespace msl
