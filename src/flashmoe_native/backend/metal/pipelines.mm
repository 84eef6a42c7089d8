#include "backend/metal/pipelines.h"

#include <glob.h>

#include <fstream>
#include <set>

#include "backend/metal/newer.h"
#include "core/error.h"

namespace flashmoe {
namespace {

std::string message(NSError* error) {
  return [[error localizedDescription] UTF8String];
}

// Appends a file of the directory, each #include "file" replaced by that file's text where it is
// not in already: Metal's run-time compiler finds no headers but its own.
void append(const std::string& directory, const std::string& file, std::set<std::string>& seen,
            std::string& text) {
  if (!seen.insert(file).second) return;
  const std::string include = "#include \"";
  std::ifstream stream(directory + "/" + file);
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with(include)) {
      const size_t length = line.rfind('"') - include.size();
      append(directory, line.substr(include.size(), length), seen, text);
    } else if (line != "#pragma once") {
      text += line + '\n';
    }
  }
}

// All kernels of a directory as one text.
std::string read_kernels(const std::string& directory) {
  std::string text;
  std::set<std::string> seen;
  glob_t found{};
  ::glob((directory + "/*.metal").c_str(), 0, nullptr, &found);
  for (size_t i = 0; i < found.gl_pathc; ++i) {
    append(directory, found.gl_pathv[i] + directory.size() + 1, seen, text);
  }
  ::globfree(&found);
  if (text.empty()) throw DeviceError(directory + ": no Metal kernels; install flashmoe again");
  return text;
}

}  // namespace

Pipelines::Pipelines(id<MTLDevice> device, const std::string& directory) : device_(device) {
  const std::string text = read_kernels(directory);
  const auto options = Owned<MTLCompileOptions*>::adopt([[MTLCompileOptions alloc] init]);
  // One language for all systems: a newer one may bring names that the kernels have.
  [options.get() setLanguageVersion:MTLLanguageVersion3_0];
  // RoPE and softmax rely on exact sin, cos and exp.
  if ([options.get() respondsToSelector:@selector(setMathMode:)]) {
    constexpr NSInteger kSafe = 0, kPrecise = 1;
    [(id<NewerMTLCompileOptions>)options.get() setMathMode:kSafe];
    [(id<NewerMTLCompileOptions>)options.get() setMathFloatingPointFunctions:kPrecise];
  } else {
    [options.get() setFastMathEnabled:NO];
  }
  NSError* error = nil;
  library_ = Owned<id<MTLLibrary>>::adopt([device_
      newLibraryWithSource:[NSString stringWithUTF8String:text.c_str()]
                   options:options.get()
                     error:&error]);
  if (!library_) throw DeviceError("Metal: cannot compile the kernels: " + message(error));
  if (error) log_ = message(error);
}

Owned<id<MTLComputePipelineState>> Pipelines::make(Kernel kernel,
                                                   const Constants& constants) const {
  const std::string what = std::string("Metal: kernel ") + name_of(kernel) + ": ";
  const auto values =
      Owned<MTLFunctionConstantValues*>::adopt([[MTLFunctionConstantValues alloc] init]);
  for (size_t index = 0; index < constants.size(); ++index) {
    [values.get() setConstantValue:&constants[index] type:MTLDataTypeUInt atIndex:index];
  }
  NSError* error = nil;
  const auto function = Owned<id<MTLFunction>>::adopt([library_.get()
      newFunctionWithName:[NSString stringWithUTF8String:name_of(kernel)]
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

std::vector<std::string> Pipelines::compiled() const {
  std::vector<std::string> result;
  for (const auto& [what, pipeline] : pipelines_) {
    if (pipeline) result.push_back(spell(what.first, what.second));
  }
  return result;
}

id<MTLComputePipelineState> Pipelines::get(Kernel kernel, const Constants& constants,
                                           uint32_t threads) {
  Owned<id<MTLComputePipelineState>>& pipeline = pipelines_[{kernel, constants}];
  if (!pipeline) pipeline = make(kernel, constants);
  const NSUInteger most = [pipeline.get() maxTotalThreadsPerThreadgroup];
  if (threads > most) {
    throw DeviceError(std::string("Metal: kernel ") + name_of(kernel) + " needs " +
                      std::to_string(threads) + " threads a threadgroup; this GPU allows " +
                      std::to_string(most));
  }
  return pipeline.get();
}

}  // namespace flashmoe
