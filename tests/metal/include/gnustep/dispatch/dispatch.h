// The part of Grand Central Dispatch that flashmoe uses; simulator/dispatch.cpp implements it.
#pragma once

#include <cstdint>

struct dispatch_object;
using dispatch_object_t = dispatch_object*;
using dispatch_queue_t = dispatch_object*;
using dispatch_group_t = dispatch_object*;
using dispatch_queue_attr_t = dispatch_object*;
using dispatch_function_t = void (*)(void*);
using dispatch_time_t = uint64_t;
using dispatch_qos_class_t = unsigned;

constexpr dispatch_queue_attr_t DISPATCH_QUEUE_CONCURRENT = nullptr;
constexpr dispatch_time_t DISPATCH_TIME_FOREVER = ~uint64_t{0};
constexpr dispatch_qos_class_t QOS_CLASS_USER_INITIATED = 0x19;

dispatch_queue_attr_t dispatch_queue_attr_make_with_qos_class(dispatch_queue_attr_t attributes,
                                                              dispatch_qos_class_t qos,
                                                              int relative_priority);
dispatch_queue_t dispatch_queue_create(const char* label, dispatch_queue_attr_t attributes);
dispatch_group_t dispatch_group_create();
void dispatch_group_async_f(dispatch_group_t group, dispatch_queue_t queue, void* context,
                            dispatch_function_t work);
intptr_t dispatch_group_wait(dispatch_group_t group, dispatch_time_t timeout);
void dispatch_release(dispatch_object_t object);
