#include "fibre.h"

namespace msl {

#if !defined(__x86_64__) || defined(EXECUTOR_UCONTEXT)

void Fibre::start(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&mine_);
  mine_.uc_stack.ss_sp = stack;
  mine_.uc_stack.ss_size = bytes;
  mine_.uc_link = nullptr;
  makecontext(&mine_, entry, 0);
}
void Fibre::resume() {
  swapcontext(&scheduler_, &mine_);
}
void Fibre::yield() {
  swapcontext(&mine_, &scheduler_);
}

#else

// Saves the registers that a function keeps and the stack pointer at *save, and takes up those of
// `to`. ucontext would do, but asks the kernel for the signal mask at every switch.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void Fibre::start(char* stack, size_t bytes, void (*entry)()) {
  // What msl_switch pops: six registers, the address to return to; then entry's own (no) caller.
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  mine_ = top;
}
void Fibre::resume() {
  msl_switch(&scheduler_, mine_);
}
void Fibre::yield() {
  msl_switch(&mine_, scheduler_);
}

#endif

}  // namespace msl
