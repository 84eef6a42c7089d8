// Threads that share a loop. One caller at a time; the caller takes part.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace flashmoe {

class ThreadPool {
 public:
  // `threads` counts the caller: 1 starts none and runs every loop in place.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Ends the threads; from then on the caller runs every loop alone.
  void stop();

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Seconds that all threads together have spent on tasks.
  double busy_seconds() const;

  // Whether the tasks of a loop take about equally long, so that how many of them a thread did
  // tells how fast its core is.
  enum class Tasks { kUnlike, kAlike };

  // Calls body(task, thread) once for each task in [0, tasks), 0 <= thread < threads(). Each thread
  // goes through a share of the tasks in order, so that what neighbouring tasks read is one run of
  // memory to it, and then helps the others with theirs. A faster core's share is larger. Of fewer
  // tasks than threads the first threads do one each. Returns when all are done. The first
  // exception that a task throws is rethrown; the tasks not yet begun are then left out.
  template <class Body>
  void parallel_for(int tasks, Body&& body, Tasks kind = Tasks::kUnlike) {
    if (tasks <= 1 || workers_.empty()) {
      const auto start = Clock::now();
      for (int task = 0; task < tasks; ++task) body(task, 0);
      shares_[0].busy += Clock::now() - start;
      return;
    }
    using Function = std::remove_reference_t<Body>;
    run(
        tasks, const_cast<void*>(static_cast<const void*>(&body)),
        [](void* context, int task, int thread) {
          (*static_cast<Function*>(context))(task, thread);
        },
        kind);
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Call = void (*)(void* context, int task, int thread);

  // A thread's part of the loop in progress: its tasks from `next` on are not begun.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
    int done = 0;     // tasks that this thread did, of any share
    float speed = 1;  // of its core, as a multiple of the average one
    Clock::duration busy{0};
  };
  struct alignas(64) Sleep {
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
  };

  void run(int tasks, void* context, Call call, Tasks kind);
  void divide(int tasks, int threads);
  void learn_speeds(int tasks);
  void work(int thread);
  void take_tasks(int thread, int threads);
  int take_share(Share& share, int thread);

  std::vector<Share> shares_;  // of each thread
  std::vector<Sleep> sleeps_;
  std::vector<std::thread> workers_;

  // The loop in progress. Written by the caller while no worker is inside (see state_).
  void* context_ = nullptr;
  Call call_ = nullptr;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  // Bits 0 to 15: workers inside the loop. 16 to 30: threads that may take part, the first ones.
  // Bit 31: the loop is open, a worker may enter. High 32 bits: the number of loops so far. A
  // worker that wakes late finds the loop closed, and the caller need not wait for it.
  alignas(64) std::atomic<uint64_t> state_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace flashmoe
