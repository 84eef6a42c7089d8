// One misuse of Metal each, by name: the simulator must end the process with a message.
#import <Metal/Metal.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "arguments.h"
#include "backend/metal/newer.h"

static id<MTLDevice> device;
static id<MTLCommandBuffer> commands;
static id<MTLComputeCommandEncoder> encoder;
static id<MTLComputePipelineState> norm;
static id<MTLBuffer> buffer;
static id<MTLCommandQueue> queue;
static id<MTLFence> fence;
static void* memory;
constexpr NSUInteger kPage = 4096;

static id<MTLBuffer> over(void* pointer, NSUInteger length, MTLResourceOptions options) {
  return [device newBufferWithBytesNoCopy:pointer length:length options:options deallocator:nil];
}

static void* pages() {
  return mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void bind(uint64_t address) {
  const shaders::NormArguments arguments{address, address, address, 4, 1e-6f};
  [encoder setComputePipelineState:norm];
  [encoder setBytes:&arguments length:sizeof arguments atIndex:0];
}

static void use(id<MTLBuffer> used) {
  const id<MTLResource> resources[] = {used};
  [encoder useResources:resources count:1 usage:MTLResourceUsageRead | MTLResourceUsageWrite];
}

static void bind_all() {
  use(buffer);
  bind([buffer gpuAddress]);
}

static void dispatch(NSUInteger groups, NSUInteger threads) {
  [encoder dispatchThreadgroups:MTLSizeMake(groups, 1, 1)
          threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
}

static void finish() {
  [encoder updateFence:fence];
  [encoder endEncoding];
  [commands commit];
  [commands waitUntilCompleted];
}

static const std::map<std::string, void (*)()> kMisuses = {
    {"none",
     [] {
       bind_all();
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"another index", [] { [encoder setBytes:"1234" length:4 atIndex:1]; }},
    {"long setBytes",
     [] {
       static char bytes[4097];
       [encoder setBytes:bytes length:sizeof bytes atIndex:0];
     }},
    {"short struct",
     [] {
       bind_all();
       [encoder setBytes:"1234" length:4 atIndex:0];
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"unbound struct",
     [] {
       [encoder setComputePipelineState:norm];
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"a host pointer",
     [] {
       use(buffer);
       bind(reinterpret_cast<uint64_t>(memory));
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"not resident",
     [] {
       bind([buffer gpuAddress]);
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"an address past the end",
     [] {
       use(buffer);
       bind([buffer gpuAddress] + kPage);
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"a misaligned address",
     [] {
       use(buffer);
       bind([buffer gpuAddress] + 2);
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"a set not committed",
     [] {
       NSError* error = nil;
       id descriptor = [[NSClassFromString(@"MTLResidencySetDescriptor") alloc] init];
       id<NewerMTLResidencySet> set =
           [(id<NewerMTLDevice>)device newResidencySetWithDescriptor:descriptor error:&error];
       [(id<NewerMTLCommandQueue>)queue addResidencySet:set];
       [set addAllocation:buffer];
       [set requestResidency];
       bind([buffer gpuAddress]);
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"removed from a set that has it not",
     [] {
       NSError* error = nil;
       id descriptor = [[NSClassFromString(@"MTLResidencySetDescriptor") alloc] init];
       [(id<NewerMTLResidencySet>)[(id<NewerMTLDevice>)device
           newResidencySetWithDescriptor:descriptor
                                   error:&error] removeAllocation:buffer];
     }},
    {"no fence",
     [] {
       [encoder endEncoding];
       [commands commit];
       id<MTLCommandBuffer> second = [queue commandBuffer];
       [[second computeCommandEncoder] endEncoding];
       [second commit];
     }},
    {"no pipeline", [] { dispatch(1, 32); }},
    {"too many threads",
     [] {
       bind_all();
       dispatch(1, 1025);
     }},
    {"empty grid",
     [] {
       bind_all();
       dispatch(0, 32);
     }},
    {"commit with an open encoder", [] { [commands commit]; }},
    {"commit twice",
     [] {
       finish();
       [commands commit];
     }},
    {"wait before commit", [] { [commands waitUntilCompleted]; }},
    {"two encoders", [] { [commands computeCommandEncoder]; }},
    {"encoder after the end",
     [] {
       [encoder endEncoding];
       dispatch(1, 32);
     }},
    {"wait after the end",
     [] {
       [encoder endEncoding];
       [encoder waitForFence:fence];
     }},
    {"two fences", [] { [encoder waitForFence:fence], [encoder waitForFence:fence]; }},
    {"encoder released open", [] { [encoder release]; }},
    {"use after release",
     [] {
       [buffer release];
       use(buffer);
     }},
    {"release twice",
     [] {
       [buffer release];
       [buffer release];
     }},
    {"unaligned pointer",
     [] { over(static_cast<char*>(pages()) + 64, kPage, MTLResourceStorageModeShared); }},
    {"unaligned length", [] { over(pages(), 100, MTLResourceStorageModeShared); }},
    {"above maxBufferLength",
     [] { over(pages(), [device maxBufferLength] + kPage, MTLResourceStorageModeShared); }},
    {"another storage mode", [] { over(pages(), kPage, 1 << 4); }},
    {"leak",
     [] {
       finish();
       over(pages(), kPage, MTLResourceStorageModeShared);
     }},
};

int main(int, char** arguments) {
  NSAutoreleasePool* pool = [[NSAutoreleasePool alloc] init];
  device = MTLCreateSystemDefaultDevice();
  queue = [device newCommandQueue];
  memory = pages();
  buffer = over(memory, kPage, MTLResourceStorageModeShared);
  fence = [device newFence];
  NSError* error = nil;
  id<MTLLibrary> library = [device newLibraryWithSource:@"KERNEL(rms_norm, "
                                                options:nil
                                                  error:&error];
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues alloc] init];
  id<MTLFunction> function = [library newFunctionWithName:@"rms_norm"
                                           constantValues:values
                                                    error:&error];
  norm = [device newComputePipelineStateWithFunction:function error:&error];
  commands = [[queue commandBuffer] retain];
  NSAutoreleasePool* inner = [[NSAutoreleasePool alloc] init];
  encoder = [[commands computeCommandEncoder] retain];
  [inner release];
  kMisuses.at(arguments[1])();
  for (id object : {(id)encoder, (id)commands, (id)norm, (id)function, (id)values, (id)library,
                    (id)buffer, (id)fence, (id)queue, (id)device, (id)pool}) {
    [object release];
  }
}
