#include "core/thread_pool.h"

#include <algorithm>

namespace flashmoe {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = 0xffff;
constexpr int kThreadsShift = 16;
constexpr int kMaxThreads = 0x7fff;
constexpr uint64_t kLoop = uint64_t{1} << 32;

int threads_of(uint64_t state) {
  return static_cast<int>(state >> kThreadsShift) & kMaxThreads;
}

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

ThreadPool::ThreadPool(int threads)
    : shares_(static_cast<size_t>(std::clamp(threads, 1, kMaxThreads))), sleeps_(shares_.size()) {
  try {
    for (int thread = 1; thread < static_cast<int>(shares_.size()); ++thread) {
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
  for (Sleep& sleep : sleeps_) {
    std::lock_guard lock(sleep.mutex);
    sleep.wake.notify_one();
  }
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(int tasks, void* context, Call call, Tasks kind) {
  context_ = context;
  call_ = call;
  const int threads = std::min(tasks, static_cast<int>(shares_.size()));
  divide(tasks, threads);
  const uint64_t loops = state_.load(std::memory_order_relaxed) / kLoop + 1;
  // Publishes the loop.
  state_.store(loops * kLoop | kOpen | static_cast<uint64_t>(threads) << kThreadsShift);
  for (int thread = 1; thread < threads; ++thread) {
    Sleep& sleep = sleeps_[static_cast<size_t>(thread)];
    if (!sleep.asleep.load()) continue;
    std::lock_guard lock(sleep.mutex);
    sleep.wake.notify_one();
  }
  take_tasks(0, threads);
  state_.fetch_and(~kOpen);
  const auto all_left = [this] { return (state_.load() & kInside) == 0; };
  while (!spin(kYield, all_left)) std::this_thread::yield();
  if (failure_) {
    std::exception_ptr failure = std::move(failure_);
    failure_ = nullptr;
    std::rethrow_exception(failure);
  }
  if (kind == Tasks::kAlike && threads == static_cast<int>(shares_.size())) learn_speeds(tasks);
}

// Gives each of the first `threads` threads tasks in proportion to its speed.
void ThreadPool::divide(int tasks, int threads) {
  float total = 0;
  for (int i = 0; i < threads; ++i) total += shares_[static_cast<size_t>(i)].speed;
  float sum = 0;
  int begin = 0;
  for (int i = 0; i < threads; ++i) {
    Share& share = shares_[static_cast<size_t>(i)];
    sum += share.speed;
    const int end = static_cast<int>(static_cast<float>(tasks) * sum / total + 0.5f);
    share.next.store(begin, std::memory_order_relaxed);
    share.end = i + 1 < threads ? std::clamp(end, begin, tasks) : tasks;
    begin = share.end;
    share.done = 0;
  }
}

// All threads end a loop together, so what each did of it is how fast it is. Slowly, so that what
// happened to one loop does not upset the next.
void ThreadPool::learn_speeds(int tasks) {
  constexpr int kLeast = 8;  // tasks a thread: of fewer, counts say little
  constexpr float kRate = 1.0f / 32;
  const auto threads = static_cast<float>(shares_.size());
  if (static_cast<float>(tasks) < kLeast * threads) return;
  for (Share& share : shares_) {
    const float speed = static_cast<float>(share.done) * threads / static_cast<float>(tasks);
    share.speed = std::clamp(share.speed + kRate * (speed - share.speed), 0.1f, 10.0f);
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;  // the last loop that this worker has been in or has missed
  Sleep& sleep = sleeps_[static_cast<size_t>(thread)];
  while (!stop_) {
    uint64_t state = 0;
    const auto has_news = [&] {
      state = state_.load();
      return stop_.load() || (state / kLoop != seen && (state & kOpen));
    };
    const auto has_work = [&] { return has_news() && (stop_ || thread < threads_of(state)); };
    if (!spin(kSpin, has_news)) {
      std::unique_lock lock(sleep.mutex);
      sleep.asleep = true;
      sleep.wake.wait(lock, has_work);
      sleep.asleep = false;
    }
    if (stop_) return;
    // Without work for this thread there may be some in the next loop, soon.
    if (thread < threads_of(state) && !state_.compare_exchange_strong(state, state + 1)) continue;
    seen = state / kLoop;
    if (thread >= threads_of(state)) continue;
    take_tasks(thread, threads_of(state));
    state_.fetch_sub(1);
  }
}

double ThreadPool::busy_seconds() const {
  Clock::duration busy{0};
  for (const Share& share : shares_) busy += share.busy;
  return std::chrono::duration<double>(busy).count();
}

void ThreadPool::take_tasks(int thread, int threads) {
  const auto start = Clock::now();
  int done = 0;
  for (int i = 0; i < threads; ++i) {
    done += take_share(shares_[static_cast<size_t>((thread + i) % threads)], thread);
  }
  Share& own = shares_[static_cast<size_t>(thread)];
  own.done = done;
  own.busy += Clock::now() - start;
}

// Returns how many of its tasks this thread did.
int ThreadPool::take_share(Share& share, int thread) {
  int done = 0;
  while (share.next.load(std::memory_order_relaxed) < share.end) {
    const int task = share.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= share.end) break;
    try {
      call_(context_, task, thread);
    } catch (...) {
      std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      for (Share& each : shares_) each.next.store(each.end, std::memory_order_relaxed);
    }
    ++done;
  }
  return done;
}

}  // namespace flashmoe
