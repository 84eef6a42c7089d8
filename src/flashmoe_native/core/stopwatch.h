// Seconds that passed.
#pragma once

#include <chrono>
#include <utility>

namespace flashmoe {

class Stopwatch {
 public:
  // Since it was made, or since the last lap.
  double lap() {
    const auto now = Clock::now();
    return std::chrono::duration<double>(now - std::exchange(last_, now)).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
};

}  // namespace flashmoe
