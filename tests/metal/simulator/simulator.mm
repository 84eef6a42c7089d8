// A Metal device on the CPU: the subset of the API in tests/metal/include, over GNUstep, with
// kernels run by tests/metal/executor.
//
// Stricter than a GPU. Every misuse that Metal's validation layer reports ends the process with a
// message: see misuse(). Objects are never reused, so that a message to a released one is seen.
// Command buffers run when they are waited for, as late as a GPU might, so that results read and
// inputs overwritten too early are wrong for sure; or at commit, if METAL_SIMULATOR_EAGER is set.
// Objects alive when the process ends make it fail.
//
// Environment, so that tests can make a machine to measure (all start with METAL_SIMULATOR_):
//   SEED         of the order in which threads run; default 1
//   FAIL         device, queue, buffer, function, pipeline or command: what does not come about
//   WORKING_SET, MAX_BUFFER, MAX_THREADS, SIMD_WIDTH   the device's limits
#import <Metal/Metal.h>
#include <objc/runtime.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "executor.h"

// ---- settings, misuse and lifetimes

static uint64_t setting(const char* name, uint64_t otherwise) {
  const char* value = getenv((std::string("METAL_SIMULATOR_") + name).c_str());
  return value ? strtoull(value, nullptr, 10) : otherwise;
}

static bool fails(const char* what) {
  const char* value = getenv("METAL_SIMULATOR_FAIL");
  return value && strcmp(value, what) == 0;
}

[[noreturn]] static void misuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("Metal simulator: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  abort();
}

static void require(bool holds, const char* what) {
  if (!holds) misuse("%s", what);
}

static NSError* error_of(const std::string& text) {
  NSDictionary* info =
      [NSDictionary dictionaryWithObject:[NSString stringWithUTF8String:text.c_str()]
                                  forKey:NSLocalizedDescriptionKey];
  return [NSError errorWithDomain:@"MetalSimulator" code:1 userInfo:info];
}

static std::mutex live_mutex;
static auto& live = *new std::map<std::string, int>;  // objects by class; read after static ends
static std::atomic<uint64_t> allocated{0};

__attribute__((destructor)) static void report_leaks() {
  bool leaks = false;
  for (const auto& [name, count] : live) {
    if (count == 0) continue;
    fprintf(stderr, "Metal simulator: %d %s never released\n", count, name.c_str());
    leaks = true;
  }
  if (leaks) _exit(86);
}

// What a released object becomes.
@interface SimReleased : NSObject
@end
@implementation SimReleased
- (id)retain {
  misuse("retain of a released object");
}
- (oneway void)release {
  misuse("release of a released object");
}
- (id)autorelease {
  misuse("autorelease of a released object");
}
- (NSMethodSignature*)methodSignatureForSelector:(SEL)selector {
  misuse("%s sent to a released object", sel_getName(selector));
}
@end

static void born(Class type) {
  std::lock_guard lock(live_mutex);
  ++live[class_getName(type)];
}

static void died(id object) {
  std::lock_guard lock(live_mutex);
  --live[class_getName(object_getClass(object))];
  object_setClass(object, [SimReleased class]);
}

@interface SimObject : NSObject
@end
@implementation SimObject
+ (id)allocWithZone:(NSZone*)zone {
  born(self);
  return [super allocWithZone:zone];
}
- (void)dealloc {
  died(self);
  if (false) [super dealloc];  // the memory stays, to be recognised
}
@end

// ---- memory

@interface SimBuffer : SimObject <MTLBuffer> {
 @public
  char* pointer;
  NSUInteger length;
  void (^deallocator)(void*, NSUInteger);
}
@end
@implementation SimBuffer
- (void)dealloc {
  allocated -= length;
  if (deallocator) {
    deallocator(pointer, length);
    _Block_release(deallocator);
  }
  [super dealloc];
}
@end

// ---- kernels

@implementation MTLCompileOptions
+ (id)allocWithZone:(NSZone*)zone {
  born(self);
  return [super allocWithZone:zone];
}
- (void)setFastMathEnabled:(BOOL)enabled {
  require(!enabled, "the kernels are written for exact arithmetic");
}
- (void)dealloc {
  died(self);
  if (false) [super dealloc];
}
@end

@interface SimConstants : MTLFunctionConstantValues {
 @public
  uint32_t values[kExecutorConstants];
  uint32_t given;
}
@end
@implementation SimConstants
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  require(type == MTLDataTypeUInt, "a function constant has another type than uint");
  require(index < kExecutorConstants, "setConstantValue: index out of range");
  memcpy(&values[index], value, sizeof(uint32_t));
  given |= 1u << index;
}
- (void)dealloc {
  died(self);
  if (false) [super dealloc];
}
@end
@implementation MTLFunctionConstantValues
+ (id)allocWithZone:(NSZone*)zone {
  if (self == [MTLFunctionConstantValues class]) return [SimConstants allocWithZone:zone];
  born(self);
  return [super allocWithZone:zone];
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  [self doesNotRecognizeSelector:_cmd];
}
@end

@interface SimFunction : SimObject <MTLFunction> {
 @public
  ExecutorDispatch dispatch;  // with kernel and constants
}
@end
@implementation SimFunction
@end

@interface SimPipeline : SimObject <MTLComputePipelineState> {
 @public
  ExecutorDispatch dispatch;
}
@end
@implementation SimPipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return setting("MAX_THREADS", 1024);
}
- (NSUInteger)threadExecutionWidth {
  return setting("SIMD_WIDTH", 32);
}
@end

@interface SimLibrary : SimObject <MTLLibrary> {
 @public
  std::string* source;
}
@end
@implementation SimLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)values
                                 error:(NSError**)error {
  const std::string kernel = [name UTF8String];
  if (fails("function") || !executor_has(kernel.c_str()) ||
      source->find("kernel void " + kernel + "(") == std::string::npos) {
    *error = error_of("the library has no function " + kernel);
    return nil;
  }
  SimFunction* function = [[SimFunction alloc] init];
  function->dispatch.kernel = strdup(kernel.c_str());
  const SimConstants* constants = static_cast<SimConstants*>(values);
  memcpy(function->dispatch.constants, constants->values, sizeof constants->values);
  function->dispatch.constants_set = constants->given;
  return function;
}
- (void)dealloc {
  delete source;
  [super dealloc];
}
@end

// ---- commands

struct Bound {
  SimBuffer* buffer = nil;  // or
  std::vector<char> bytes;
  NSUInteger offset = 0;
};

struct Dispatch {
  SimPipeline* pipeline;
  ExecutorDispatch launch;
  std::vector<Bound> bound;
};

@class SimEncoder;
@class SimQueue;

@interface SimCommandBuffer : SimObject <MTLCommandBuffer> {
 @public
  SimQueue* queue;
  std::vector<Dispatch>* dispatches;
  SimEncoder* encoder;  // the open one
  MTLCommandBufferStatus state;
  NSError* failure;
}
- (void)execute;
@end

@interface SimQueue : SimObject <MTLCommandQueue> {
 @public
  std::vector<SimCommandBuffer*>* committed;  // in this order, and not yet run
}
@end

@interface SimEncoder : SimObject <MTLComputeCommandEncoder> {
 @public
  SimCommandBuffer* commands;
  SimPipeline* pipeline;
  std::vector<Bound>* bound;
  bool ended;
}
@end

static void bind(std::vector<Bound>& table, NSUInteger index, Bound bound) {
  [bound.buffer retain];
  [table[index].buffer release];
  table[index] = std::move(bound);
}

@implementation SimEncoder
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  require(!ended, "setComputePipelineState: after endEncoding");
  [state retain];
  [pipeline release];
  pipeline = static_cast<SimPipeline*>(state);
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  require(!ended, "setBytes: after endEncoding");
  require(index < kExecutorBuffers, "setBytes: index out of range");
  require(length > 0 && length <= 4096, "setBytes: length is not 1 to 4096 bytes");
  const char* data = static_cast<const char*>(bytes);
  bind(*bound, index, {nil, std::vector<char>(data, data + length), 0});
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  require(!ended, "setBuffer: after endEncoding");
  require(index < kExecutorBuffers, "setBuffer: index out of range");
  [buffer retain];  // fails for a released one
  SimBuffer* memory = static_cast<SimBuffer*>(buffer);
  require(memory == nil || offset < memory->length, "setBuffer: offset beyond the buffer's end");
  bind(*bound, index, {memory, {}, offset});
  [buffer release];
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  require(!ended, "dispatchThreadgroups: after endEncoding");
  require(pipeline != nil, "dispatchThreadgroups: no pipeline state is set");
  require(groups.width * groups.height * groups.depth > 0, "dispatchThreadgroups: an empty grid");
  const NSUInteger count = threads.width * threads.height * threads.depth;
  require(count > 0 && count <= [pipeline maxTotalThreadsPerThreadgroup],
          "dispatchThreadgroups: threads per threadgroup out of range");
  Dispatch dispatch{[pipeline retain], pipeline->dispatch, *bound};
  for (const Bound& one : dispatch.bound) [one.buffer retain];
  const MTLSize sizes[2] = {groups, threads};
  uint32_t* to[2] = {dispatch.launch.threadgroups, dispatch.launch.threads};
  for (int i = 0; i < 2; ++i) {
    to[i][0] = static_cast<uint32_t>(sizes[i].width);
    to[i][1] = static_cast<uint32_t>(sizes[i].height);
    to[i][2] = static_cast<uint32_t>(sizes[i].depth);
  }
  commands->dispatches->push_back(std::move(dispatch));
}
- (void)endEncoding {
  require(!ended, "endEncoding: called twice");
  ended = true;
  commands->encoder = nil;
}
- (void)dealloc {
  require(ended, "an encoder was released before endEncoding");
  for (const Bound& one : *bound) [one.buffer release];
  delete bound;
  [pipeline release];
  [commands release];
  [super dealloc];
}
@end

@implementation SimCommandBuffer
- (MTLCommandBufferStatus)status {
  return state;
}
- (NSError*)error {
  return failure;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  require(state == MTLCommandBufferStatusNotEnqueued, "computeCommandEncoder: after commit");
  require(encoder == nil, "computeCommandEncoder: another encoder is open");
  encoder = [[[SimEncoder alloc] init] autorelease];
  encoder->commands = [self retain];
  encoder->bound = new std::vector<Bound>(kExecutorBuffers);
  return encoder;
}
- (void)commit {
  require(state == MTLCommandBufferStatusNotEnqueued, "commit: called twice");
  require(encoder == nil, "commit: an encoder is open");
  state = MTLCommandBufferStatusCommitted;
  queue->committed->push_back([self retain]);
  if (setting("EAGER", 0)) [self waitUntilCompleted];
}
- (void)waitUntilCompleted {
  require(state != MTLCommandBufferStatusNotEnqueued, "waitUntilCompleted: before commit");
  while (state == MTLCommandBufferStatusCommitted) {
    SimCommandBuffer* next = queue->committed->front();
    queue->committed->erase(queue->committed->begin());
    [next execute];
    [next release];
  }
}
- (void)execute {
  state = MTLCommandBufferStatusCompleted;
  if (fails("command")) {
    state = MTLCommandBufferStatusError;
    failure = [error_of("out of memory, says the simulator") retain];
    return;
  }
  for (Dispatch& dispatch : *dispatches) {
    for (int index = 0; index < kExecutorBuffers; ++index) {
      Bound& one = dispatch.bound[static_cast<size_t>(index)];
      ExecutorBuffer& to = dispatch.launch.buffers[index];
      if (one.buffer) {
        to = {one.buffer->pointer + one.offset, one.buffer->length - one.offset};
      } else if (!one.bytes.empty()) {
        to = {one.bytes.data(), one.bytes.size()};
      }
    }
    dispatch.launch.seed = static_cast<uint32_t>(setting("SEED", 1));
    if (const char* wrong = executor_run(&dispatch.launch)) misuse("%s", wrong);
  }
}
- (void)dealloc {
  for (const Dispatch& dispatch : *dispatches) {
    for (const Bound& one : dispatch.bound) [one.buffer release];
    [dispatch.pipeline release];
  }
  delete dispatches;
  [failure release];
  [queue release];
  [super dealloc];
}
@end

@implementation SimQueue
- (id<MTLCommandBuffer>)commandBuffer {
  SimCommandBuffer* buffer = [[[SimCommandBuffer alloc] init] autorelease];
  buffer->queue = [self retain];
  buffer->dispatches = new std::vector<Dispatch>();
  return buffer;
}
- (void)dealloc {
  delete committed;
  [super dealloc];
}
@end

// ---- the device

@interface SimDevice : SimObject <MTLDevice>
@end
@implementation SimDevice
- (NSString*)name {
  return @"Metal simulator";
}
- (uint64_t)recommendedMaxWorkingSetSize {
  return setting("WORKING_SET", uint64_t{64} << 30);
}
- (NSUInteger)currentAllocatedSize {
  return allocated;
}
- (NSUInteger)maxBufferLength {
  return setting("MAX_BUFFER", uint64_t{32} << 30);
}
- (id<MTLCommandQueue>)newCommandQueue {
  if (fails("queue")) return nil;
  SimQueue* queue = [[SimQueue alloc] init];
  queue->committed = new std::vector<SimCommandBuffer*>();
  return queue;
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void*, NSUInteger))deallocator {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  require(reinterpret_cast<uintptr_t>(pointer) % page == 0,
          "newBufferWithBytesNoCopy: the pointer is not page-aligned");
  require(length > 0 && length % page == 0,
          "newBufferWithBytesNoCopy: the length is not a multiple of the page size");
  require(length <= [self maxBufferLength], "newBufferWithBytesNoCopy: above maxBufferLength");
  require(options == MTLResourceStorageModeShared,
          "newBufferWithBytesNoCopy: the storage mode is not shared");
  if (fails("buffer")) return nil;
  SimBuffer* buffer = [[SimBuffer alloc] init];
  buffer->pointer = static_cast<char*>(pointer);
  buffer->length = length;
  if (deallocator) {
    buffer->deallocator = reinterpret_cast<void (^)(void*, NSUInteger)>(_Block_copy(deallocator));
  }
  allocated += length;
  return buffer;
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  const std::string text = [source UTF8String];
  // The executor has compiled the same files; what its compiler could not see is checked here.
  for (const char* wrong : {"#error", "#include \""}) {
    const size_t at = text.find(wrong);
    if (at == std::string::npos) continue;
    *error = error_of("program_source: " + text.substr(at, text.find('\n', at) - at));
    return nil;
  }
  SimLibrary* library = [[SimLibrary alloc] init];
  library->source = new std::string(text);
  return library;
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(NSError**)error {
  if (fails("pipeline")) {
    *error = error_of("too many registers, says the simulator");
    return nil;
  }
  SimPipeline* pipeline = [[SimPipeline alloc] init];
  pipeline->dispatch = static_cast<SimFunction*>(function)->dispatch;
  return pipeline;
}
@end

extern "C" id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  return fails("device") ? nil : [[SimDevice alloc] init];
}
