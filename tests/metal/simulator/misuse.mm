// One misuse of Metal each, by name: the simulator must end the process with a message.
#import <Metal/Metal.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "arguments.h"

static id<MTLDevice> device;
static id<MTLCommandBuffer> commands;
static id<MTLComputeCommandEncoder> encoder;
static id<MTLComputePipelineState> norm;
static id<MTLBuffer> buffer;
static id<MTLCommandQueue> queue;
constexpr NSUInteger kPage = 4096;

static id<MTLBuffer> over(void* pointer, NSUInteger length, MTLResourceOptions options) {
  return [device newBufferWithBytesNoCopy:pointer length:length options:options deallocator:nil];
}

static void* pages() {
  return mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void bind_all() {
  const shaders::NormArguments arguments{4, 1e-6f};
  [encoder setComputePipelineState:norm];
  for (const uint32_t index : {shaders::kNormX, shaders::kNormWeight, shaders::kNormOut}) {
    [encoder setBuffer:buffer offset:0 atIndex:index];
  }
  [encoder setBytes:&arguments length:sizeof arguments atIndex:shaders::kNormArguments];
}

static void dispatch(NSUInteger groups, NSUInteger threads) {
  [encoder dispatchThreadgroups:MTLSizeMake(groups, 1, 1)
          threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
}

static void finish() {
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
    {"index out of range", [] { [encoder setBuffer:buffer offset:0 atIndex:31]; }},
    {"offset beyond the end", [] { [encoder setBuffer:buffer offset:2 * kPage atIndex:0]; }},
    {"misaligned offset",
     [] {
       bind_all();
       [encoder setBuffer:buffer offset:2 atIndex:shaders::kNormX];
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"long setBytes",
     [] {
       static char bytes[4097];
       [encoder setBytes:bytes length:sizeof bytes atIndex:0];
     }},
    {"short struct",
     [] {
       bind_all();
       [encoder setBytes:"1234" length:4 atIndex:shaders::kNormArguments];
       dispatch(1, shaders::kNormThreads);
       finish();
     }},
    {"unbound buffer",
     [] {
       bind_all();
       [encoder setBuffer:nil offset:0 atIndex:shaders::kNormWeight];
       dispatch(1, shaders::kNormThreads);
       finish();
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
    {"encoder released open", [] { [encoder release]; }},
    {"use after release",
     [] {
       [buffer release];
       [encoder setBuffer:buffer offset:0 atIndex:0];
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
  buffer = over(pages(), kPage, MTLResourceStorageModeShared);
  NSError* error = nil;
  id<MTLLibrary> library = [device newLibraryWithSource:@"kernel void rms_norm("
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
                    (id)buffer, (id)queue, (id)device, (id)pool}) {
    [object release];
  }
}
