#if defined(__APPLE__) || defined(FLASHMOE_SIMULATED_DISPATCH)
#include <dispatch/dispatch.h>

#include "core/io_queue.h"

namespace flashmoe {

struct IoQueue::Impl {
  dispatch_queue_t queue = dispatch_queue_create(
      "flashmoe.io", dispatch_queue_attr_make_with_qos_class(DISPATCH_QUEUE_CONCURRENT,
                                                             QOS_CLASS_USER_INITIATED, 0));
  dispatch_group_t group = dispatch_group_create();

  ~Impl() {
    dispatch_release(group);
    dispatch_release(queue);
  }
};

IoQueue::IoQueue(int) : impl_(std::make_unique<Impl>()) {}

IoQueue::~IoQueue() {
  dispatch_group_wait(impl_->group, DISPATCH_TIME_FOREVER);
}

void IoQueue::submit(std::vector<Task> tasks) {
  std::vector<std::unique_ptr<Task>> owned;
  for (Task& task : tasks) owned.push_back(std::make_unique<Task>(std::move(task)));
  for (std::unique_ptr<Task>& task : owned) {
    dispatch_group_async_f(impl_->group, impl_->queue, task.release(), [](void* context) {
      const std::unique_ptr<Task> run(static_cast<Task*>(context));
      (*run)();
    });
  }
}

}  // namespace flashmoe
#endif
