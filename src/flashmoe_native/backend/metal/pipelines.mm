#include "backend/metal/pipelines.h"

#include <fstream>
#include <set>

#include "core/error.h"

namespace flashmoe {
namespace {

struct Source {
  const char* file;
  const char* kernel;
};
#define FLASHMOE_KERNEL_SOURCE(file, kernel) {#file ".metal", #kernel},
constexpr Source kSources[] = {FLASHMOE_KERNELS(FLASHMOE_KERNEL_SOURCE)};
#undef FLASHMOE_KERNEL_SOURCE

const Source& source_of(Kernel kernel) {
  return kSources[static_cast<size_t>(kernel)];
}

// The text of a file in place of each #include "file": Metal's run-time compiler reads no headers
// but its own. `seen` has the files that are in the text already.
std::string expand(const std::string& directory, const std::string& file,
                   std::set<std::string>& seen) {
  if (!seen.insert(file).second) return "";
  std::ifstream stream(directory + "/" + file);
  if (!stream) throw DeviceError(directory + "/" + file + ": no such kernels; install flashmoe again");
  const std::string include = "#include \"";
  std::string text, line;
  while (std::getline(stream, line)) {
    if (line.starts_with(include)) {
      const size_t end = line.find('"', include.size());
      text += expand(directory, line.substr(include.size(), end - include.size()), seen);
    } else {
      text += line;
    }
    text += '\n';
  }
  return text;
}

std::string message(NSError* error) {
  return [[error localizedDescription] UTF8String];
}

}  // namespace

Pipelines::Pipelines(id<MTLDevice> device, std::string directory)
    : device_(device), directory_(std::move(directory)) {
  for (const Source& source : kSources) library(source.file);
}

id<MTLLibrary> Pipelines::library(const std::string& file) {
  Owned<id<MTLLibrary>>& library = libraries_[file];
  if (!library) {
    std::set<std::string> seen;
    const std::string text = expand(directory_, file, seen);
    const auto options = Owned<MTLCompileOptions*>::adopt([[MTLCompileOptions alloc] init]);
    [options.get() setFastMathEnabled:NO];  // infinities and the order of sums mean what they say
    NSError* error = nil;
    library = Owned<id<MTLLibrary>>::adopt(
        [device_ newLibraryWithSource:[NSString stringWithUTF8String:text.c_str()]
                              options:options.get()
                                error:&error]);
    if (!library) throw DeviceError("Metal: cannot compile " + file + ": " + message(error));
  }
  return library.get();
}

Owned<id<MTLComputePipelineState>> Pipelines::make(Kernel kernel, const Constants& constants) {
  const Source& source = source_of(kernel);
  const std::string what = std::string("Metal: kernel ") + source.kernel + ": ";
  const auto values =
      Owned<MTLFunctionConstantValues*>::adopt([[MTLFunctionConstantValues alloc] init]);
  for (size_t index = 0; index < constants.size(); ++index) {
    [values.get() setConstantValue:&constants[index] type:MTLDataTypeUInt atIndex:index];
  }
  NSError* error = nil;
  const auto function = Owned<id<MTLFunction>>::adopt([library(source.file)
      newFunctionWithName:[NSString stringWithUTF8String:source.kernel]
           constantValues:values.get()
                    error:&error]);
  if (!function) throw DeviceError(what + message(error));
  auto pipeline = Owned<id<MTLComputePipelineState>>::adopt(
      [device_ newComputePipelineStateWithFunction:function.get() error:&error]);
  if (!pipeline) throw DeviceError(what + message(error));
  const NSUInteger width = [pipeline.get() threadExecutionWidth];
  if (width != shaders::kSimdWidth) {
    throw DeviceError(what + "written for simdgroups of 32 threads; this GPU's have " +
                      std::to_string(width));
  }
  return pipeline;
}

id<MTLComputePipelineState> Pipelines::get(Kernel kernel, const Constants& constants,
                                           uint32_t threads) {
  Owned<id<MTLComputePipelineState>>& pipeline = pipelines_[{kernel, constants}];
  if (!pipeline) pipeline = make(kernel, constants);
  const NSUInteger most = [pipeline.get() maxTotalThreadsPerThreadgroup];
  if (threads > most) {
    throw DeviceError(std::string("Metal: kernel ") + source_of(kernel).kernel + " needs " +
                      std::to_string(threads) + " threads a threadgroup; this GPU allows " +
                      std::to_string(most));
  }
  return pipeline.get();
}

}  // namespace flashmoe
