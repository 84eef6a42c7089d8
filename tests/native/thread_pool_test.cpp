// ThreadPool: every task runs once, on a thread of its own at a time; exceptions come back.
#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using flashmoe::ThreadPool;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// Plain counters on purpose: a task that ran twice, or a thread index that two threads had at once,
// is a data race for ThreadSanitizer.
void run_loops(ThreadPool& pool, int loops) {
  std::vector<int> by_thread(static_cast<size_t>(pool.threads()));
  for (int loop = 0; loop < loops; ++loop) {
    const int tasks = loop * 7 % 40;
    std::vector<int> done(static_cast<size_t>(tasks));
    pool.parallel_for(tasks, [&](int task, int thread) {
      expect(0 <= thread && thread < pool.threads(), "thread is an index");
      ++done[static_cast<size_t>(task)];
      ++by_thread[static_cast<size_t>(thread)];
    });
    for (const int count : done) expect(count == 1, "each task runs once, before the loop returns");
  }
}

void every_task_runs_once() {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    expect(pool.threads() == threads, "threads counts the caller");
    run_loops(pool, 3000);
  }
}

// The caller's first task lasts until all others are done, some of which are of its own share.
void threads_that_are_done_help_the_others() {
  for (const int threads : {2, 4}) {
    ThreadPool pool(threads);
    constexpr int kTasks = 64;
    std::atomic<int> done = 0;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    pool.parallel_for(kTasks, [&](int task, int) {
      while (task == 0 && done < kTasks - 1 && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
      if (task == 0) expect(done == kTasks - 1, "no task waits for a thread that is busy");
      ++done;
    });
  }
}

void few_tasks_take_few_threads() {
  ThreadPool pool(4);
  for (int loop = 0; loop < 300; ++loop) {
    std::atomic<int> begun = 0;
    pool.parallel_for(2, [&](int, int thread) {
      expect(thread < 2, "a loop of two tasks leaves the other threads alone");
      ++begun;
      while (begun < 2) std::this_thread::yield();  // so that two threads are needed
    });
  }
}

// Thread 1 needs four times as long, so that its share should shrink from a half to a fifth.
void a_faster_core_has_a_larger_share() {
  constexpr int kTasks = 64;
  ThreadPool pool(2);
  std::vector<int> firsts;  // the tasks that thread 1 began with: where its share begins
  for (int loop = 0; loop < 150; ++loop) {
    std::atomic<int> first = -1;
    pool.parallel_for(
        kTasks,
        [&](int task, int thread) {
          int none = -1;
          if (thread == 1) first.compare_exchange_strong(none, task);
          std::this_thread::sleep_for(std::chrono::microseconds(thread == 1 ? 800 : 200));
        },
        ThreadPool::Tasks::kAlike);
    firsts.push_back(first);
  }
  expect(firsts.front() <= kTasks / 2, "shares are equal at first");
  std::sort(firsts.end() - 20, firsts.end());
  expect(firsts[firsts.size() - 10] >= kTasks * 5 / 8, "shares follow the cores' speeds");
}

void workers_that_slept_come_back() {
  ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    run_loops(pool, 2);
  }
}

void pools_do_not_disturb_each_other() {
  std::thread other([] {
    ThreadPool pool(2);
    run_loops(pool, 2000);
  });
  ThreadPool pool(2);
  run_loops(pool, 2000);
  other.join();
}

void the_first_exception_comes_back_and_the_pool_goes_on() {
  for (const int threads : {1, 4}) {
    ThreadPool pool(threads);
    for (int i = 0; i < 200; ++i) {
      bool caught = false;
      std::atomic<int> begun = 0;
      std::atomic<bool> thrown = false;
      try {
        pool.parallel_for(10000, [&](int task, int) {
          ++begun;
          if (task == 5) {
            thrown = true;
            throw std::runtime_error("task 5");
          }
          // The others last until then, and long enough for it to be caught.
          while (task > 5 && !thrown) std::this_thread::yield();
          if (task > 5) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        });
      } catch (const std::runtime_error& error) {
        caught = std::string(error.what()) == "task 5";
      }
      expect(caught, "an exception reaches the caller");
      expect(begun < 10000, "tasks not yet begun are left out");
    }
    run_loops(pool, 10);
  }
}

void pools_come_and_go() {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(3);
    if (i % 2) run_loops(pool, 1);
  }
}

}  // namespace

int main() {
  every_task_runs_once();
  threads_that_are_done_help_the_others();
  few_tasks_take_few_threads();
  a_faster_core_has_a_larger_share();
  workers_that_slept_come_back();
  pools_do_not_disturb_each_other();
  the_first_exception_comes_back_and_the_pool_goes_on();
  pools_come_and_go();
}
