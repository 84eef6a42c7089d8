#include <cstdlib>
#include <stdexcept>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#elif defined(__aarch64__)
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif
#endif

namespace flashmoe {

const Kernels* portable_kernels();
#ifdef __x86_64__
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

namespace {

// CPUID 7.1, EAX bit 4: not every compiler's __builtin_cpu_supports() knows it.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

}  // namespace
#elif defined(__aarch64__)
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();
const Kernels* neon_i8mm_kernels();

namespace {

#ifdef __APPLE__
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return ::sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() {
  return has("hw.optional.arm.FEAT_DotProd");
}
bool has_i8mm() {
  return has("hw.optional.arm.FEAT_I8MM");
}
#else
// Bits of Linux's arch/arm64/include/uapi/asm/hwcap.h.
bool has_dotprod() {
  return (::getauxval(AT_HWCAP) >> 20 & 1) != 0;
}
bool has_i8mm() {
  return (::getauxval(AT_HWCAP2) >> 13 & 1) != 0;
}
#endif

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found = {portable_kernels()};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(avx2_kernels());
    if (has_avx_vnni()) found.push_back(avx_vnni_kernels());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
      found.push_back(avx512_kernels());
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(avx512_bf16_kernels());
    }
  }
#elif defined(__aarch64__)
  found.push_back(neon_kernels());
  if (has_dotprod()) {
    found.push_back(neon_dotprod_kernels());
    if (has_i8mm()) found.push_back(neon_i8mm_kernels());
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
