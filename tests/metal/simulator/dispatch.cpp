// Grand Central Dispatch over threads, a thread a task. Ends the process where an object is used
// after its release, or released while tasks of it run.
#include <dispatch/dispatch.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

struct dispatch_object {
  std::mutex mutex;
  std::condition_variable wake;
  int running = 0;
  bool released = false;
};

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "Metal simulator: dispatch: %s\n", what);
  std::abort();
}

void change(dispatch_object* object, int by) {
  std::lock_guard lock(object->mutex);
  require(!object->released, "a queue or group was used after its release");
  object->running += by;
  object->wake.notify_all();
}

}  // namespace

dispatch_queue_attr_t dispatch_queue_attr_make_with_qos_class(dispatch_queue_attr_t attributes,
                                                              dispatch_qos_class_t qos, int) {
  require(qos == QOS_CLASS_USER_INITIATED, "reads have another QoS class than meant");
  return attributes;
}

dispatch_queue_t dispatch_queue_create(const char*, dispatch_queue_attr_t attributes) {
  require(attributes == DISPATCH_QUEUE_CONCURRENT, "the queue is not concurrent");
  return new dispatch_object;
}

dispatch_group_t dispatch_group_create() {
  return new dispatch_object;
}

void dispatch_group_async_f(dispatch_group_t group, dispatch_queue_t queue, void* context,
                            dispatch_function_t work) {
  change(group, 1);
  change(queue, 1);
  std::thread([=] {
    work(context);
    change(queue, -1);
    change(group, -1);
  }).detach();
}

intptr_t dispatch_group_wait(dispatch_group_t group, dispatch_time_t) {
  std::unique_lock lock(group->mutex);
  group->wake.wait(lock, [&] { return group->running == 0; });
  return 0;
}

void dispatch_release(dispatch_object_t object) {
  std::lock_guard lock(object->mutex);
  require(!object->released, "released twice");
  require(object->running == 0, "released while tasks run");
  object->released = true;  // the memory stays, so that a use of it is seen
}
