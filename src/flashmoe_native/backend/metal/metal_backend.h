// The Metal backend: plans, encoded into command buffers that finish() commits and waits for.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace flashmoe {

// The alignment is what kernels load at once.
constexpr WeightRules kMetalWeights{.alignment = 16, .maps = true};

// `kernels` is the directory of the .metal files, which are compiled here. With `overlap` experts
// are computed as soon as they are asked for, beside the reads of others; else all experts of a
// layer together when they have been read, for on Apple GPU and SSD share the memory's bandwidth.
// Throws DeviceError where there is no GPU of Apple silicon, or Metal's compiler refuses a kernel.
std::unique_ptr<Backend> make_metal_backend(const std::string& kernels, bool overlap);

}  // namespace flashmoe
