#if !defined(__APPLE__) && !defined(FLASHMOE_SIMULATED_DISPATCH)
#include <condition_variable>
#include <iterator>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "core/io_queue.h"

namespace flashmoe {

struct IoQueue::Impl {
  std::mutex mutex;
  std::condition_variable wake;
  std::list<Task> tasks;  // whose ends are joined without memory
  bool stopping = false;
  std::vector<std::thread> threads;

  explicit Impl(int width) {
    try {
      for (int i = 0; i < width; ++i) threads.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Impl() { stop(); }

  // Once every task is done.
  void stop() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
  }

  void work() {
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return stopping || !tasks.empty(); });
      if (tasks.empty()) return;
      std::list<Task> first;
      first.splice(first.end(), tasks, tasks.begin());
      lock.unlock();
      first.front()();
      first.clear();
      lock.lock();
    }
  }
};

IoQueue::IoQueue(int width) : impl_(std::make_unique<Impl>(width)) {}

IoQueue::~IoQueue() = default;

void IoQueue::submit(std::vector<Task> tasks) {
  std::list<Task> added(std::move_iterator(tasks.begin()), std::move_iterator(tasks.end()));
  {
    std::lock_guard lock(impl_->mutex);
    impl_->tasks.splice(impl_->tasks.end(), added);
  }
  impl_->wake.notify_all();
}

}  // namespace flashmoe
#endif
