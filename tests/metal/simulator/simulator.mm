// A Metal device on the CPU: the subset of the API in tests/metal/include, over GNUstep, with
// kernels run by tests/metal/executor.
//
// Stricter than a GPU. Every misuse that Metal's validation layer reports ends the process with a
// message, and some that it does not: see misuse(). Objects are never reused, so that a message to
// a released one is seen. The GPU sees a buffer at another address than the host, and only while
// the buffer is alive and resident. Command buffers run when they are waited for, as late as a GPU
// might, so that results read and inputs overwritten too early are wrong for sure; or at commit, if
// METAL_SIMULATOR_EAGER is set. Objects alive when the process ends make it fail.
//
// Environment, so that tests can make a machine to measure (all start with METAL_SIMULATOR_):
//   SEED         of the order in which threads run; default 1
//   FAIL         "nothing but warn" (the compiler), device, queue, buffer, residency, function,
//   pipeline, command, timeout or memory:
//                what does not come about
//   MACOS        its version; default 15
//   FAMILY       the GPU's, of Apple's; default 9
//   UNIFIED      0: the GPU has memory of its own
//   WORKING_SET, MAX_BUFFER, MAX_THREADS, SIMD_WIDTH   the device's limits
//   TRACE        1: tells on stderr of pipelines (kernel, then constants), of buffers that become
//                resident (bytes), of residency that is asked for, and of command buffers
#import <Metal/Metal.h>
#include <objc/runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "backend/metal/newer.h"
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

static void trace(const std::string& what) {
  if (setting("TRACE", 0)) fprintf(stderr, "%s\n", what.c_str());
}

[[noreturn]] static void misuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("Metal simulator: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  abort();
}

static double clock_seconds() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
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

constexpr size_t kGuard = 1 << 20;  // of nothing, before and behind what the GPU sees of a buffer

@interface SimBuffer : SimObject <MTLBuffer> {
 @public
  char* pointer;  // to the host
  char* view;     // to the GPU
  NSUInteger length;
  int access;       // that view has when the GPU may use it
  bool accessible;  // and now
  void (^deallocator)(void*, NSUInteger);
}
@end

static std::recursive_mutex memory_mutex;
static auto& buffers = *new std::set<SimBuffer*>;  // alive

// The same pages as the host's, at another address. Private ones become shared.
static void make_view(SimBuffer* buffer) {
  char* room = static_cast<char*>(
      mmap(nullptr, buffer->length + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  buffer->view = room + kGuard;
  buffer->access = PROT_READ;
  // (an old size of 0 makes a second mapping of pages that are shared, and fails for others)
  void* shared =
      mremap(buffer->pointer, 0, buffer->length, MREMAP_MAYMOVE | MREMAP_FIXED, buffer->view);
  if (shared == MAP_FAILED) {
    const int pages = memfd_create("buffer", 0);
    require(ftruncate(pages, static_cast<off_t>(buffer->length)) == 0, "no memory for a buffer");
    mmap(buffer->view, buffer->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, pages, 0);
    const std::vector<char> zeros(4096);
    for (size_t at = 0; at < buffer->length; at += zeros.size()) {
      if (memcmp(buffer->pointer + at, zeros.data(), zeros.size()) == 0) continue;
      memcpy(buffer->view + at, buffer->pointer + at, zeros.size());
    }
    mmap(buffer->pointer, buffer->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, pages, 0);
    close(pages);
    buffer->access = PROT_READ | PROT_WRITE;
  }
  mprotect(buffer->view, buffer->length, PROT_NONE);
}

@implementation SimBuffer
- (uint64_t)gpuAddress {
  return reinterpret_cast<uint64_t>(view);
}
- (void)dealloc {
  {
    std::lock_guard lock(memory_mutex);
    buffers.erase(self);
    // The addresses stay reserved, so that a use of them is seen.
    mmap(view, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  }
  allocated -= length;
  if (deallocator) {
    deallocator(pointer, length);
    _Block_release(deallocator);
  }
  [super dealloc];
}
@end

@interface MTLResidencySetDescriptor : SimObject
@end
@implementation MTLResidencySetDescriptor
@end

@interface SimResidencySet : SimObject <NewerMTLResidencySet> {
 @public
  std::set<SimBuffer*>*named, *committed;
  bool requested;
}
@end
@implementation SimResidencySet
- (void)addAllocation:(id)allocation {
  std::lock_guard lock(memory_mutex);
  require([allocation isKindOfClass:[SimBuffer class]], "addAllocation: not a buffer");
  require(named->insert(static_cast<SimBuffer*>(allocation)).second, "addAllocation: added twice");
  [allocation retain];
  trace("resident " + std::to_string(static_cast<SimBuffer*>(allocation)->length));
}
- (void)removeAllocation:(id)allocation {
  std::lock_guard lock(memory_mutex);
  require(named->erase(static_cast<SimBuffer*>(allocation)) == 1,
          "removeAllocation: it was not added");
  [allocation release];
}
- (void)commit {
  std::lock_guard lock(memory_mutex);
  *committed = *named;
}
- (void)requestResidency {
  trace("residency requested");
  requested = true;
}
- (void)dealloc {
  for (SimBuffer* buffer : *named) [buffer release];
  delete named;
  delete committed;
  [super dealloc];
}
@end

// ---- kernels

@interface SimOptions : MTLCompileOptions <NewerMTLCompileOptions> {
 @public
  int exact;  // of two: how sums are made, and functions
  MTLLanguageVersion language;
}
@end
@implementation SimOptions
- (BOOL)respondsToSelector:(SEL)selector {
  if (sel_isEqual(selector, @selector(setMathMode:))) return setting("MACOS", 15) >= 15;
  return [super respondsToSelector:selector];
}
- (void)setMathMode:(NSInteger)mode {
  exact += mode == 0;
}
- (void)setMathFloatingPointFunctions:(NSInteger)functions {
  exact += functions == 1;
}
- (void)setFastMathEnabled:(BOOL)enabled {
  require(setting("MACOS", 15) < 15, "setFastMathEnabled: deprecated since macOS 15");
  exact += enabled ? 0 : 2;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  language = version;
}
@end
@implementation MTLCompileOptions
+ (id)allocWithZone:(NSZone*)zone {
  if (self == [MTLCompileOptions class]) return [SimOptions allocWithZone:zone];
  born(self);
  return [super allocWithZone:zone];
}
- (void)setFastMathEnabled:(BOOL)enabled {
  [self doesNotRecognizeSelector:_cmd];
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  [self doesNotRecognizeSelector:_cmd];
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
  return std::min<uint64_t>(setting("MAX_THREADS", 1024), executor_threads(dispatch.kernel));
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
  if (fails("function") || executor_threads(kernel.c_str()) == 0 ||
      source->find("KERNEL(" + kernel + ", ") == std::string::npos) {
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

struct Dispatch {
  SimPipeline* pipeline;
  ExecutorDispatch launch;
  std::vector<char> arguments;     // of index 0
  std::set<SimBuffer*> resources;  // of useResources
};

@interface SimFence : SimObject <MTLFence>
@end
@implementation SimFence
@end

@class SimEncoder;
@class SimQueue;

@interface SimCommandBuffer : SimObject <MTLCommandBuffer> {
 @public
  SimQueue* queue;
  std::vector<Dispatch>* dispatches;
  SimEncoder* encoder;  // the open one
  SimFence *waits, *updates;
  MTLCommandBufferStatus state;
  NSError* failure;
  double began, ended;
}
- (void)execute;
@end

@interface SimQueue : SimObject <MTLCommandQueue, NewerMTLCommandQueue> {
 @public
  std::vector<SimCommandBuffer*>* committed;  // in this order, and not yet run
  std::vector<SimResidencySet*>* sets;
}
@end

@interface SimEncoder : SimObject <MTLComputeCommandEncoder> {
 @public
  SimCommandBuffer* commands;
  SimPipeline* pipeline;
  std::vector<char>* arguments;
  std::set<SimBuffer*>* resources;
  bool ended;
}
@end

@implementation SimEncoder
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  require(!ended, "setComputePipelineState: after endEncoding");
  [state retain];
  [pipeline release];
  pipeline = static_cast<SimPipeline*>(state);
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  require(!ended, "setBytes: after endEncoding");
  require(length > 0 && length <= 4096, "setBytes: length is not 1 to 4096 bytes");
  require(index == 0, "setBytes: no kernel has an argument at this index");
  const char* data = static_cast<const char*>(bytes);
  arguments->assign(data, data + length);
}
- (void)useResources:(const id<MTLResource>[])resources_
               count:(NSUInteger)count
               usage:(MTLResourceUsage)usage {
  require(!ended, "useResources: after endEncoding");
  require(count > 0, "useResources: none");
  require(usage == (MTLResourceUsageRead | MTLResourceUsageWrite), "useResources: other usage");
  for (NSUInteger i = 0; i < count; ++i) {
    SimBuffer* buffer = static_cast<SimBuffer*>(resources_[i]);
    if (resources->insert([buffer retain]).second) continue;
    [buffer release];
  }
}
- (void)waitForFence:(id<MTLFence>)fence {
  require(!ended && commands->waits == nil, "waitForFence: after endEncoding, or a second fence");
  commands->waits = [static_cast<SimFence*>(fence) retain];
}
- (void)updateFence:(id<MTLFence>)fence {
  require(!ended && commands->updates == nil, "updateFence: after endEncoding, or a second fence");
  commands->updates = [static_cast<SimFence*>(fence) retain];
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  require(!ended, "dispatchThreadgroups: after endEncoding");
  require(pipeline != nil, "dispatchThreadgroups: no pipeline state is set");
  require(groups.width * groups.height * groups.depth > 0, "dispatchThreadgroups: an empty grid");
  const NSUInteger count = threads.width * threads.height * threads.depth;
  require(count > 0 && count <= [pipeline maxTotalThreadsPerThreadgroup],
          "dispatchThreadgroups: threads per threadgroup out of range");
  Dispatch dispatch{[pipeline retain], pipeline->dispatch, *arguments, *resources};
  for (SimBuffer* buffer : *resources) [buffer retain];
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
  for (SimBuffer* buffer : *resources) [buffer release];
  delete resources;
  delete arguments;
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
- (double)GPUStartTime {
  require(state >= MTLCommandBufferStatusCompleted, "GPUStartTime: before it has run");
  return began;
}
- (double)GPUEndTime {
  require(state >= MTLCommandBufferStatusCompleted, "GPUEndTime: before it has run");
  return ended;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  require(state == MTLCommandBufferStatusNotEnqueued, "computeCommandEncoder: after commit");
  require(encoder == nil, "computeCommandEncoder: another encoder is open");
  encoder = [[[SimEncoder alloc] init] autorelease];
  encoder->commands = [self retain];
  encoder->arguments = new std::vector<char>();
  encoder->resources = new std::set<SimBuffer*>();
  return encoder;
}
- (void)commit {
  require(state == MTLCommandBufferStatusNotEnqueued, "commit: called twice");
  require(encoder == nil, "commit: an encoder is open");
  // With addresses Metal cannot see what needs what.
  require(queue->committed->empty() || (waits && waits == queue->committed->back()->updates),
          "commit: no fence orders this encoder behind the one before it");
  trace("command buffer committed");
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
- (void)failWith:(const char*)words code:(NSInteger)code {
  NSDictionary* info = [NSDictionary dictionaryWithObject:[NSString stringWithUTF8String:words]
                                                   forKey:NSLocalizedDescriptionKey];
  state = MTLCommandBufferStatusError;
  failure = [[NSError errorWithDomain:@"MetalSimulator" code:code userInfo:info] retain];
}
- (void)execute {
  began = clock_seconds();
  [self run];
  ended = clock_seconds();
}
- (void)run {
  state = MTLCommandBufferStatusCompleted;
  if (fails("command")) return [self failWith:"a page fault, says the simulator" code:3];
  if (fails("timeout")) return [self failWith:"too slow, says the simulator" code:2];
  if (fails("memory")) return [self failWith:"out of memory, says the simulator" code:8];
  std::lock_guard lock(memory_mutex);
  for (Dispatch& dispatch : *dispatches) {
    for (SimBuffer* buffer : buffers) {
      bool resident = dispatch.resources.count(buffer) > 0;
      for (const SimResidencySet* set : *queue->sets) {
        resident |= set->requested && set->committed->count(buffer) > 0;
      }
      if (resident == buffer->accessible) continue;
      buffer->accessible = resident;
      mprotect(buffer->view, buffer->length, resident ? buffer->access : PROT_NONE);
    }
    for (size_t at = 0; at + sizeof(char*) <= dispatch.arguments.size(); at += sizeof(char*)) {
      char* word;
      memcpy(&word, dispatch.arguments.data() + at, sizeof word);
      for (const SimBuffer* buffer : buffers) {
        require(word < buffer->pointer || word >= buffer->pointer + buffer->length,
                "an argument is a host pointer, not a GPU address");
      }
    }
    dispatch.launch.arguments = dispatch.arguments.empty() ? nullptr : dispatch.arguments.data();
    dispatch.launch.arguments_length = dispatch.arguments.size();
    dispatch.launch.seed = static_cast<uint32_t>(setting("SEED", 1));
    if (const char* wrong = executor_run(&dispatch.launch)) misuse("%s", wrong);
  }
}
- (void)dealloc {
  for (const Dispatch& dispatch : *dispatches) {
    for (SimBuffer* buffer : dispatch.resources) [buffer release];
    [dispatch.pipeline release];
  }
  delete dispatches;
  [waits release];
  [updates release];
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
- (void)addResidencySet:(id)set {
  sets->push_back([static_cast<SimResidencySet*>(set) retain]);
}
- (void)dealloc {
  for (SimResidencySet* set : *sets) [set release];
  delete sets;
  delete committed;
  [super dealloc];
}
@end

// ---- the device

@interface SimDevice : SimObject <MTLDevice, NewerMTLDevice>
@end
@implementation SimDevice
- (BOOL)respondsToSelector:(SEL)selector {
  if (sel_isEqual(selector, @selector(newResidencySetWithDescriptor:error:))) {
    return setting("MACOS", 15) >= 15;
  }
  return [super respondsToSelector:selector];
}
- (BOOL)hasUnifiedMemory {
  return setting("UNIFIED", 1) != 0;
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
  if (family == MTLGPUFamilyMetal3) return setting("MACOS", 15) >= 13;
  return family <= static_cast<NSInteger>(1000 + setting("FAMILY", 9));
}
- (id<MTLFence>)newFence {
  return [[SimFence alloc] init];
}
- (id)newResidencySetWithDescriptor:(id)descriptor error:(NSError**)error {
  require([descriptor isKindOfClass:[MTLResidencySetDescriptor class]], "no descriptor of a set");
  if (fails("residency")) {
    *error = error_of("no set, says the simulator");
    return nil;
  }
  SimResidencySet* set = [[SimResidencySet alloc] init];
  set->named = new std::set<SimBuffer*>();
  set->committed = new std::set<SimBuffer*>();
  return set;
}
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
  queue->sets = new std::vector<SimResidencySet*>();
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
  std::lock_guard lock(memory_mutex);
  make_view(buffer);
  buffers.insert(buffer);
  return buffer;
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  const SimOptions* given = static_cast<SimOptions*>(options);
  require(!given || given->exact == 2, "the kernels are written for exact arithmetic");
  require(!given || given->language == MTLLanguageVersion3_0, "another language version than 3.0");
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
  if (fails("nothing but warn")) *error = error_of("warning: unused variable 'simulator'");
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
  std::string told = std::string("pipeline ") + pipeline->dispatch.kernel;
  for (int i = 0; pipeline->dispatch.constants_set >> i & 1; ++i) {
    told += " " + std::to_string(pipeline->dispatch.constants[i]);
  }
  trace(told);
  return pipeline;
}
@end

extern "C" id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  return fails("device") ? nil : [[SimDevice alloc] init];
}
