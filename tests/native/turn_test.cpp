// Turns: one thread at a time, in the order in which they asked; who cannot wait is told.
#include "core/turn.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"

using flashmoe::StateError;
using flashmoe::Turn;
using flashmoe::Turns;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

const auto nothing = [] {};

void threads_have_it_one_at_a_time() {
  Turns turns;
  int count = 0;  // plain on purpose: two threads at once are a data race for ThreadSanitizer
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int turn = 0; turn < 2000; ++turn) {
        const Turn mine(turns, nothing);
        ++count;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(count == 8000, "every turn was taken");
}

void threads_have_it_in_the_order_they_asked() {
  Turns turns;
  std::vector<int> order;
  std::atomic<int> waiting = 0;  // threads that were asked to check, which those that wait are
  std::vector<std::thread> threads;
  {
    const Turn mine(turns, nothing);
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        bool counted = false;
        const Turn turn(turns, [&] { waiting += std::exchange(counted, true) ? 0 : 1; });
        order.push_back(i);
      });
      while (waiting <= i) std::this_thread::yield();
    }
  }
  for (std::thread& thread : threads) thread.join();
  expect(order == std::vector<int>{0, 1, 2, 3}, "in the order they asked");
}

void a_thread_that_has_it_is_refused() {
  Turns turns;
  {
    const Turn mine(turns, nothing);
    try {
      turns.take(nothing);
      expect(false, "a second turn of one thread");
    } catch (const StateError&) {
    }
  }
  const Turn again(turns, nothing);
}

// As a signal handler may, that runs while its thread waits.
void a_thread_that_waits_for_it_is_refused_and_may_give_up() {
  Turns turns;
  const Turn mine(turns, nothing);
  std::thread([&] {
    bool refused = false;
    try {
      turns.take([&] {
        try {
          turns.take(nothing);
        } catch (const StateError&) {
          refused = true;
        }
        throw std::runtime_error("enough");
      });
      expect(false, "the turn was another's");
    } catch (const std::runtime_error&) {
    }
    expect(refused, "a second wait of one thread");
  }).join();
}

void who_gave_up_holds_nobody_up() {
  Turns turns;
  std::atomic<bool> gone = false;
  std::thread quitter, waiter;
  {
    const Turn mine(turns, nothing);
    quitter = std::thread([&] {
      try {
        turns.take([] { throw std::runtime_error("enough"); });
      } catch (const std::runtime_error&) {
        gone = true;
        gone.notify_one();
      }
    });
    waiter = std::thread([&] { const Turn turn(turns, nothing); });
    gone.wait(false);
  }
  quitter.join();
  waiter.join();
  const Turn again(turns, nothing);
}

}  // namespace

int main() {
  threads_have_it_one_at_a_time();
  threads_have_it_in_the_order_they_asked();
  a_thread_that_has_it_is_refused();
  a_thread_that_waits_for_it_is_refused_and_may_give_up();
  who_gave_up_holds_nobody_up();
  std::puts("ok");
}
