#include "executor.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibre.h"
#include "include/lane.h"

namespace msl {
namespace {

constexpr unsigned kSimdWidth = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10, kMaxThreadgroupBytes = 32 << 10;

enum class Wait { kNone, kSimd, kThreadgroup, kDone };
enum class Operation { kSum, kMax, kMin, kShuffleXor, kBarrier };

struct Lane {
  Fibre fibre;
  Wait wait;
  Operation operation;
  Site site;
  unsigned value, mask;  // value: the bits of a float or an unsigned
};

// The dispatch under way; there is one at a time.
struct Run {
  ExecutorDispatch* dispatch;
  void (*kernel)();
  unsigned threads;
  unsigned group[3];
  uint64_t number = 0;  // of the threadgroup, never 0 and never the same again
  size_t threadgroup_bytes;
  unsigned current;  // thread
  std::string error;
  sigjmp_buf fault;
};

std::mutex turns;
Run run;
Lane lanes[kMaxThreads];
char* stacks;

float to_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
unsigned to_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[gnu::format(printf, 1, 2)]] void set_error(const char* format, ...) {
  if (!run.error.empty()) return;
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  run.error = std::string(run.dispatch->kernel) + ": " + text + " (threadgroup " +
              std::to_string(run.group[0]) + ", " + std::to_string(run.group[1]) + ", " +
              std::to_string(run.group[2]) + ")";
}

// Ends the current thread, and with it the dispatch, whose error is set.
[[noreturn]] void abandon() {
  lanes[run.current].wait = Wait::kDone;
  while (true) lanes[run.current].fibre.yield();
}

unsigned park(Wait wait, Operation operation, unsigned value, unsigned mask, Site site) {
  Lane& lane = lanes[run.current];
  lane.wait = wait;
  lane.operation = operation;
  lane.site = site;
  lane.value = value;
  lane.mask = mask;
  lane.fibre.yield();
  return lane.value;
}

void enter_kernel() {
  run.kernel();
  abandon();
}

// Gives the lanes of a simdgroup, all parked at one operation, their results.
void resolve(Lane* simdgroup) {
  unsigned value[kSimdWidth];
  for (unsigned i = 0; i < kSimdWidth; ++i) value[i] = simdgroup[i].value;
  unsigned result[kSimdWidth];
  std::copy(value, value + kSimdWidth, result);
  if (simdgroup[0].operation == Operation::kShuffleXor) {
    for (unsigned i = 0; i < kSimdWidth; ++i) {
      result[i] = value[(i ^ simdgroup[i].mask) % kSimdWidth];
    }
  } else if (simdgroup[0].operation != Operation::kBarrier) {
    for (unsigned half = kSimdWidth / 2; half > 0; half /= 2) {
      for (unsigned i = 0; i < half; ++i) {
        const float a = to_float(value[i]), b = to_float(value[i + half]);
        switch (simdgroup[0].operation) {
          case Operation::kSum:
            value[i] = to_bits(a + b);
            break;
          case Operation::kMax:
            value[i] = to_bits(a < b ? b : a);
            break;
          default:
            value[i] = std::min(value[i], value[i + half]);
        }
      }
    }
    std::fill(result, result + kSimdWidth, value[0]);
  }
  for (unsigned i = 0; i < kSimdWidth; ++i) {
    simdgroup[i].value = result[i];
    simdgroup[i].wait = Wait::kNone;
  }
}

// Lets a simdgroup go on if its lanes, none of which runs, wait at an operation.
void resolve_simdgroup(Lane* simdgroup) {
  unsigned waiting = 0;
  const Lane* one = nullptr;
  bool same = true;
  for (unsigned i = 0; i < kSimdWidth; ++i) {
    if (simdgroup[i].wait != Wait::kSimd) continue;
    if (one) same &= one->site == simdgroup[i].site && one->operation == simdgroup[i].operation;
    one = &simdgroup[i];
    ++waiting;
  }
  if (waiting == 0) return;
  if (waiting == kSimdWidth && same) return resolve(simdgroup);
  set_error("simdgroup operation on line %d not reached by every lane of simdgroup %u",
            one->site.line, static_cast<unsigned>(simdgroup - lanes) / kSimdWidth);
}

// Runs the lanes that can run, in any order, up to their next wait, which ends where it can.
void step(unsigned simdgroup, std::mt19937* shuffle) {
  unsigned order[kSimdWidth];
  std::iota(order, order + kSimdWidth, simdgroup * kSimdWidth);
  if (shuffle) std::shuffle(order, order + kSimdWidth, *shuffle);
  for (const unsigned i : order) {
    if (lanes[i].wait != Wait::kNone) continue;
    run.current = i;
    lanes[i].fibre.resume();
    if (!run.error.empty()) return;
  }
  resolve_simdgroup(lanes + simdgroup * kSimdWidth);
}

// Lets all threads go on if they wait at one barrier; says whether they did.
bool resolve_barrier() {
  unsigned waiting = 0;
  const Lane* one = nullptr;
  bool same = true;
  for (unsigned i = 0; i < run.threads; ++i) {
    if (lanes[i].wait != Wait::kThreadgroup) continue;
    if (one) same &= one->site == lanes[i].site;
    one = &lanes[i];
    ++waiting;
  }
  if (waiting == 0) return false;
  if (waiting < run.threads || !same) {
    set_error("threadgroup_barrier on line %d reached by %u of %u threads%s", one->site.line,
              waiting, run.threads, same ? "" : ", others wait at another");
    return false;
  }
  for (unsigned i = 0; i < run.threads; ++i) lanes[i].wait = Wait::kNone;
  return true;
}

void run_threadgroup(std::mt19937* shuffle) {
  ++run.number;
  run.threadgroup_bytes = 0;
  for (unsigned i = 0; i < run.threads; ++i) {
    lanes[i].wait = Wait::kNone;
    lanes[i].fibre.start(stacks + i * kStack, kStack, enter_kernel);
  }
  // One simdgroup runs far ahead of the others as often as it does not, so that nothing is in
  // order but by a barrier. (All lanes of a simdgroup wait for the same: one tells.)
  std::vector<unsigned> ready;
  while (run.error.empty()) {
    ready.clear();
    for (unsigned i = 0; i < run.threads; i += kSimdWidth) {
      if (lanes[i].wait == Wait::kNone) ready.push_back(i / kSimdWidth);
    }
    if (ready.empty()) {
      if (!resolve_barrier()) return;
      continue;
    }
    const unsigned simdgroup = shuffle ? ready[(*shuffle)() % ready.size()] : ready[0];
    const bool far = !shuffle || (*shuffle)() % 2 == 0;
    do {
      step(simdgroup, shuffle);
    } while (far && run.error.empty() && lanes[simdgroup * kSimdWidth].wait == Wait::kNone);
  }
}

constexpr size_t kPage = 16384;  // a multiple of the page of every machine that this runs on
constexpr unsigned char kCanary = 0xa5;

struct Allocation {
  char* pages;
  size_t length, room;
};
std::mutex allocations_mutex;
std::unordered_map<void*, Allocation> allocations;

// Which allocation an address is nearest to.
std::string where(const char* address) {
  std::string text;
  uint64_t nearest = 1 << 20;
  const std::lock_guard lock(allocations_mutex);
  for (const auto& [data, allocation] : allocations) {
    const char* begin = static_cast<const char*>(data);
    const char* end = begin + allocation.length;
    const auto distance = static_cast<uint64_t>(address >= end ? address - end : begin - address);
    if (distance >= nearest) continue;
    nearest = distance;
    text = ", " + std::to_string(distance) + " bytes " +
           (address >= end ? "past the end" : "before the begin") + " of an array of " +
           std::to_string(allocation.length);
  }
  return text;
}

const char* name_of(int signal) {
  return signal == SIGILL ? "misaligned read or write" : "read or write outside every buffer";
}

void on_fault(int signal, siginfo_t* info, void*) {
  set_error("%s by thread %u%s", name_of(signal), run.current,
            signal == SIGILL ? "" : where(static_cast<char*>(info->si_addr)).c_str());
  siglongjmp(run.fault, 1);
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL};

class FaultHandlers {
 public:
  FaultHandlers() {
    static char stack[64 << 10];
    stack_t mine = {};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  struct sigaction old_[3];
  stack_t old_stack_;
};

void run_grid() {
  const uint32_t* grid = run.dispatch->threadgroups;
  std::vector<uint64_t> order(uint64_t{grid[0]} * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::mt19937 shuffle(run.dispatch->seed);
  const bool shuffled = run.dispatch->seed != 0;
  if (shuffled) std::shuffle(order.begin(), order.end(), shuffle);
  const FaultHandlers handlers;
  if (sigsetjmp(run.fault, 1)) return;
  for (const uint64_t at : order) {
    run.group[0] = static_cast<unsigned>(at % grid[0]);
    run.group[1] = static_cast<unsigned>(at / grid[0] % grid[1]);
    run.group[2] = static_cast<unsigned>(at / grid[0] / grid[1]);
    run_threadgroup(shuffled ? &shuffle : nullptr);
    if (!run.error.empty()) return;
  }
}

const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel = kernels; kernel->name; ++kernel) {
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  }
  return nullptr;
}

std::string check(const ExecutorDispatch& dispatch) {
  const std::string name = dispatch.kernel;
  const uint32_t most = executor_threads(dispatch.kernel);
  if (most == 0) return name + ": no such kernel";
  for (const uint32_t size : dispatch.threadgroups) {
    if (size == 0) return name + ": empty grid";
  }
  uint64_t threads = 1;
  for (const uint32_t size : dispatch.threads) threads *= size;
  if (threads == 0 || threads > most || threads % kSimdWidth != 0) {
    return name + ": " + std::to_string(threads) +
           " threads a threadgroup; a multiple of 32 up to " + std::to_string(most) + " is wanted";
  }
  return "";
}

}  // namespace

float simd_sum(float value, Site site) {
  return to_float(park(Wait::kSimd, Operation::kSum, to_bits(value), 0, site));
}
float simd_max(float value, Site site) {
  return to_float(park(Wait::kSimd, Operation::kMax, to_bits(value), 0, site));
}
unsigned simd_min(unsigned value, Site site) {
  return park(Wait::kSimd, Operation::kMin, value, 0, site);
}
float simd_shuffle_xor(float value, unsigned mask, Site site) {
  return to_float(park(Wait::kSimd, Operation::kShuffleXor, to_bits(value), mask, site));
}
void simdgroup_barrier(Site site) {
  park(Wait::kSimd, Operation::kBarrier, 0, 0, site);
}
void threadgroup_barrier(Site site) {
  park(Wait::kThreadgroup, Operation::kBarrier, 0, 0, site);
}

const void* arguments(size_t size) {
  const ExecutorDispatch& dispatch = *run.dispatch;
  if (!dispatch.arguments) {
    set_error("nothing is bound at index 0");
  } else if (dispatch.arguments_length < size) {
    set_error("%llu bytes are bound at index 0, where the argument has %zu",
              static_cast<unsigned long long>(dispatch.arguments_length), size);
  } else {
    return dispatch.arguments;
  }
  abandon();
}

unsigned place(int quantity, int axis) {
  const uint32_t* size = run.dispatch->threads;
  const unsigned index = run.current;
  const unsigned position[3] = {index % size[0], index / size[0] % size[1],
                                index / (size[0] * size[1])};
  switch (quantity) {
    case kPositionInGrid:
      return run.group[axis] * size[axis] + position[axis];
    case kGroupInGrid:
      return run.group[axis];
    case kIndexInGroup:
      return index;
    case kSimdgroup:
      return index / kSimdWidth;
    default:
      return index % kSimdWidth;
  }
}

unsigned function_constant(int at) {
  run.dispatch->used_constants |= 1u << at;
  if (!(run.dispatch->constants_set >> at & 1)) {
    set_error("function constant %d has no value", at);
    abandon();
  }
  return run.dispatch->constants[at];
}

void enter_threadgroup_memory(void* data, size_t size, uint64_t* group) {
  if (*group == run.number) return;
  *group = run.number;
  run.threadgroup_bytes += (size + 15) / 16 * 16;
  if (run.threadgroup_bytes > kMaxThreadgroupBytes) {
    set_error("%zu bytes of threadgroup memory; there are 32768", run.threadgroup_bytes);
    abandon();
  }
  constexpr unsigned kPoison = 0x7fc0dead;  // a NaN, and an index out of every range
  for (size_t i = 0; i + sizeof kPoison <= size; i += sizeof kPoison) {
    std::memcpy(static_cast<char*>(data) + i, &kPoison, sizeof kPoison);
  }
}

}  // namespace msl

const char* executor_run(ExecutorDispatch* dispatch) {
  using namespace msl;
  static thread_local std::string error;
  const std::lock_guard lock(turns);
  dispatch->used_constants = 0;
  error = check(*dispatch);
  if (!error.empty()) return error.c_str();
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  run.dispatch = dispatch;
  run.kernel = find_kernel(dispatch->kernel)->run;
  run.threads = dispatch->threads[0] * dispatch->threads[1] * dispatch->threads[2];
  run.error.clear();
  run_grid();
  error = run.error;
  return error.empty() ? nullptr : error.c_str();
}

uint32_t executor_threads(const char* kernel) {
  const msl::Kernel* found = msl::find_kernel(kernel);
  return found ? found->threads : 0;
}

void* executor_allocate(uint64_t length) {
  using namespace msl;
  const size_t room = (length + kPage - 1) / kPage * kPage;
  void* pages = mmap(nullptr, room + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(pages) + kPage;
  if (room > 0) mprotect(first, room, PROT_READ | PROT_WRITE);
  char* data = first + (room - length) / 16 * 16;
  std::memset(data + length, kCanary, static_cast<size_t>(first + room - (data + length)));
  const std::lock_guard lock(allocations_mutex);
  allocations[data] = {static_cast<char*>(pages), length, room};
  return data;
}

const char* executor_free(void* data) {
  using namespace msl;
  const std::lock_guard lock(allocations_mutex);
  const auto found = allocations.find(data);
  if (found == allocations.end()) return "executor_free: not from executor_allocate";
  const Allocation allocation = found->second;
  allocations.erase(found);
  const char* end = allocation.pages + kPage + allocation.room;
  const bool written =
      std::any_of(static_cast<char*>(data) + allocation.length, const_cast<char*>(end),
                  [](char c) { return static_cast<unsigned char>(c) != kCanary; });
  munmap(allocation.pages, allocation.room + 2 * kPage);
  return written ? "bytes past the end of a buffer were written" : nullptr;
}
