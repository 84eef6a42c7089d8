#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>

namespace flashmoe {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;
constexpr uint64_t kLoop = uint64_t{1} << 32;

// Between two operations of a decode step a worker waits a few microseconds, between two steps
// about a hundred; before it sleeps it spins for longer than that, and for less than an expert's
// read from disk takes.
constexpr auto kSpin = std::chrono::microseconds(200);
// The caller, whose worker may have lost its core, offers its own after less.
constexpr auto kYield = std::chrono::microseconds(50);
constexpr int kPausesPerClock = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready` or the time is over; says which.
template <class Ready>
bool spin(std::chrono::microseconds time, Ready ready) {
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < kPausesPerClock; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : shares_(static_cast<size_t>(std::max(threads, 1))) {
  try {
    for (int thread = 1; thread < threads; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  stop_ = true;
  {
    std::lock_guard lock(sleep_mutex_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(int tasks, void* context, Call call) {
  context_ = context;
  call_ = call;
  const auto count = static_cast<int64_t>(shares_.size());
  for (int64_t i = 0; i < count; ++i) {
    shares_[i].next.store(static_cast<int>(tasks * i / count), std::memory_order_relaxed);
    shares_[i].end = static_cast<int>(tasks * (i + 1) / count);
  }
  state_.fetch_add(kLoop | kOpen);  // publishes the loop
  if (sleepers_.load() > 0) {
    std::lock_guard lock(sleep_mutex_);
    wake_.notify_all();
  }
  take_tasks(0);
  state_.fetch_and(~kOpen);
  const auto all_left = [this] { return (state_.load() & kInside) == 0; };
  while (!spin(kYield, all_left)) std::this_thread::yield();
  if (failure_) {
    std::exception_ptr failure = std::move(failure_);
    failure_ = nullptr;
    std::rethrow_exception(failure);
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;  // the last loop that this worker has been in or has missed
  while (!stop_) {
    uint64_t state = 0;
    const auto has_news = [&] {
      state = state_.load();
      return stop_.load() || (state / kLoop != seen && (state & kOpen));
    };
    if (!spin(kSpin, has_news)) {
      std::unique_lock lock(sleep_mutex_);
      ++sleepers_;
      wake_.wait(lock, has_news);
      --sleepers_;
    }
    if (stop_) return;
    if (!state_.compare_exchange_strong(state, state + 1)) continue;
    seen = state / kLoop;
    take_tasks(thread);
    state_.fetch_sub(1);
  }
}

void ThreadPool::take_tasks(int thread) {
  const size_t count = shares_.size();
  for (size_t i = 0; i < count; ++i) {
    take_share(shares_[(static_cast<size_t>(thread) + i) % count], thread);
  }
}

void ThreadPool::take_share(Share& share, int thread) {
  while (share.next.load(std::memory_order_relaxed) < share.end) {
    const int task = share.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= share.end) return;
    try {
      call_(context_, task, thread);
    } catch (...) {
      std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      for (Share& each : shares_) each.next.store(each.end, std::memory_order_relaxed);
    }
  }
}

}  // namespace flashmoe
