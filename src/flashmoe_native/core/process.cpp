#include "core/process.h"

#include <pthread.h>

#include <atomic>

#include "core/error.h"

namespace flashmoe {
namespace {

std::atomic<int> generation = 0;  // forks between this process and the one that was watched first
std::atomic<int> calls = 0;
std::atomic<bool> ending = false;

}  // namespace

void watch_process() {
  pthread_atfork(nullptr, nullptr, [] {
    ++generation;
    calls = 0;  // those of threads that do not exist here
  });
}

Origin::Origin() : generation_(generation) {}

bool Origin::elsewhere() const {
  return generation_ != generation;
}

Call::Call() {
  ++calls;
  if (!ending) return;
  --calls;
  require_running();
}

Call::~Call() {
  if (!origin_.elsewhere()) --calls;
}

void end_calls() {
  ending = true;
}

int calls_under_way() {
  return calls;
}

void require_running() {
  if (ending) throw StateError("the program is ending, and this thread's call with it");
}

}  // namespace flashmoe
