// Runs reads beside the computation: a few threads, or on Apple a Grand Central Dispatch queue.
#pragma once

#include <functional>
#include <memory>

namespace flashmoe {

class IoQueue {
 public:
  // `width` tasks at a time (GCD chooses its own).
  explicit IoQueue(int width);
  // Waits for every task.
  ~IoQueue();
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  // Tasks start in order and must not throw.
  void submit(std::function<void()> task);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashmoe
