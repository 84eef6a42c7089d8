// Threads that share a loop. One caller at a time; the caller takes part.
#pragma once

#include <atomic>
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

  // Calls body(task, thread) once for each task in [0, tasks), 0 <= thread < threads(). Each thread
  // goes through a share of the tasks in order, so that what neighbouring tasks read is one run of
  // memory to it, and then helps the others with theirs. Returns when all are done. The first
  // exception that a task throws is rethrown; the tasks not yet begun are then left out.
  template <class Body>
  void parallel_for(int tasks, Body&& body) {
    if (tasks <= 1 || workers_.empty()) {
      for (int task = 0; task < tasks; ++task) body(task, 0);
      return;
    }
    using Function = std::remove_reference_t<Body>;
    run(tasks, const_cast<void*>(static_cast<const void*>(&body)),
        [](void* context, int task, int thread) {
          (*static_cast<Function*>(context))(task, thread);
        });
  }

 private:
  using Call = void (*)(void* context, int task, int thread);

  // Tasks of the loop in progress: those from `next` on are not begun.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  void run(int tasks, void* context, Call call);
  void work(int thread);
  void take_tasks(int thread);
  void take_share(Share& share, int thread);

  std::vector<std::thread> workers_;
  std::vector<Share> shares_;  // of each thread

  // The loop in progress. Written by the caller while no worker is inside (see state_).
  void* context_ = nullptr;
  Call call_ = nullptr;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  // Low 31 bits: workers inside the loop. Bit 31: the loop is open, a worker may enter. High 32
  // bits: the number of loops so far. A worker that wakes late finds the loop closed, and the
  // caller need not wait for it.
  alignas(64) std::atomic<uint64_t> state_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

}  // namespace flashmoe
