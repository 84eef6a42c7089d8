#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace flashmoe {

enum class Precision { kFloat32, kInt8 };
// "float32" or "int8"; throws std::invalid_argument.
Precision parse_precision(const std::string& name);

constexpr WeightRules kCpuWeights{.alignment = 2, .maps = false};

// `threads` computes with so many threads, the caller's among them. Results do not depend on it,
// nor on how tokens are divided into calls. kInt8 quantizes the inputs of quantized matrices to 8
// bits per group; kFloat32 keeps them.
std::unique_ptr<Backend> make_cpu_backend(Precision precision, int threads);

// The kernels that make_cpu_backend picks on this machine: "portable", "avx2", "avx512", "neon",
// "neon-dotprod", "neon-i8mm". The environment variable FLASHMOE_ISA overrides the choice (an
// unknown or absent one throws).
std::string cpu_kernels();

}  // namespace flashmoe
