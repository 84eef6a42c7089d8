// The project's shaders as C++, and a table of their kernels.
#include <metal_stdlib>

#include "attention.metal"
#include "delta.metal"
#include "embed.metal"
#include "experts.metal"
#include "matmul.metal"
#include "matvec.metal"
#include "norm.metal"
#include "route.metal"

namespace msl {

#define ENTRY(name) {#name, name##_threads, [] { ::name(); }},
extern const Kernel kernels[] = {FLASHMOE_KERNELS(ENTRY){nullptr, 0, nullptr}};

}  // namespace msl
