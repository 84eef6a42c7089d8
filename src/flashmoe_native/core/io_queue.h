// Runs reads beside the computation: a few threads, or on Apple a Grand Central Dispatch queue.
#pragma once

#include <functional>
#include <memory>
#include <vector>

namespace flashmoe {

class IoQueue {
 public:
  // `width` tasks at a time (GCD chooses its own).
  explicit IoQueue(int width);
  // Waits for every task.
  ~IoQueue();
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  using Task = std::function<void()>;
  // Tasks start in order and must not throw. All are taken, or where this throws, none.
  void submit(std::vector<Task> tasks);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashmoe
