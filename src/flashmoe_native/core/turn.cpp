#include "core/turn.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"

namespace flashmoe {

void Turns::take(const std::function<void()>& check) {
  const std::thread::id self = std::this_thread::get_id();
  std::unique_lock lock(mutex_);
  if (is_queued(self)) {
    throw StateError(
        "this thread is in the middle of a call to this model, so that a second one, as from a "
        "signal handler, would wait for ever; make it when the first has returned");
  }
  queue_.push_back(self);
  const auto first = [&] { return queue_.front() == self; };
  while (!wake_.wait_for(lock, std::chrono::milliseconds(50), first)) {
    lock.unlock();
    try {
      check();
    } catch (...) {
      lock.lock();
      queue_.erase(std::find(queue_.begin(), queue_.end(), self));
      wake_.notify_all();  // it may have become the first meanwhile
      throw;
    }
    lock.lock();
  }
}

bool Turns::asked() {
  std::lock_guard lock(mutex_);
  return is_queued(std::this_thread::get_id());
}

bool Turns::is_queued(std::thread::id thread) const {
  return std::find(queue_.begin(), queue_.end(), thread) != queue_.end();
}

void Turns::give_back() {
  {
    std::lock_guard lock(mutex_);
    queue_.pop_front();
  }
  wake_.notify_all();
}

}  // namespace flashmoe
