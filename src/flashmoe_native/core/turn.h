// Lets threads use something one after another, in the order in which they asked.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace flashmoe {

class Turns {
 public:
  // Waits; `check` is called now and then meanwhile and may throw. Throws StateError where this
  // thread has the turn already, or waits for it: a signal handler that runs in the middle of a
  // call would wait for that very call.
  void take(const std::function<void()>& check);
  void give_back();
  // Whether this thread has the turn or waits for it.
  bool asked();

 private:
  bool is_queued(std::thread::id thread) const;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::thread::id> queue_;  // who has the turn, then who waits for it
};

// The turn of the thread that makes it, until it is destroyed. Throws what take() throws.
class Turn {
 public:
  Turn(Turns& turns, const std::function<void()>& check) : turns_(turns) { turns.take(check); }
  ~Turn() { turns_.give_back(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Turns& turns_;
};

}  // namespace flashmoe
