#include <cstdlib>
#include <stdexcept>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels.h"

namespace flashmoe {

const Kernels* portable_kernels();
#ifdef __x86_64__
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found = {portable_kernels()};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(avx2_kernels());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
      found.push_back(avx512_kernels());
    }
  }
#endif
  return found;
}

const Kernels& select_kernels() {
  const std::vector<const Kernels*> found = available_kernels();
  const char* wanted = std::getenv("FLASHMOE_ISA");
  if (!wanted || !*wanted) return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (std::string(wanted) == kernels->name) return *kernels;
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  throw std::invalid_argument("FLASHMOE_ISA is \"" + std::string(wanted) +
                              "\"; this machine and build have: " + names);
}

std::string cpu_kernels() {
  return select_kernels().name;
}

}  // namespace flashmoe
