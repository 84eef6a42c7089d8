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

void IoQueue::submit(std::function<void()> task) {
  auto* owned = new std::function<void()>(std::move(task));
  dispatch_group_async_f(impl_->group, impl_->queue, owned, [](void* context) {
    const std::unique_ptr<std::function<void()>> run(static_cast<std::function<void()>*>(context));
    (*run)();
  });
}

}  // namespace flashmoe
#endif
