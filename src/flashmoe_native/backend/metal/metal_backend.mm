// The Metal backend: what each operation binds and how its grid is divided. metal/arguments.h says
// what the kernels want.
#include "backend/metal/metal_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "backend/metal/commands.h"
#include "backend/metal/memory.h"
#include "backend/metal/pipelines.h"
#include "core/error.h"

namespace flashmoe {
namespace {

using namespace shaders;

constexpr int kDecodeTokens = 4;      // up to which reading a weight again a token is no loss
constexpr uint32_t kLeastKeys = 128;  // of a split of attention: less is not worth a merge
constexpr uint32_t kEnoughGroups = 128;  // threadgroups that fill a GPU
constexpr size_t kStagingBytes = 64 << 10;

static_assert(static_cast<uint32_t>(DType::F32) == kF32 &&
              static_cast<uint32_t>(DType::F16) == kF16 &&
              static_cast<uint32_t>(DType::BF16) == kBF16);

uint32_t u32(int64_t value) {
  return static_cast<uint32_t>(value);
}
uint32_t divide_up(int64_t value, int64_t unit) {
  return u32((value + unit - 1) / unit);
}
uint32_t round_up(int64_t value, int64_t unit) {
  return u32(divide_up(value, unit) * unit);
}

bool same_format(const Matrix& a, const Matrix& b) {
  return a.bits == b.bits && a.group == b.group && a.dtype == b.dtype;
}

// What to bind where a dense matrix has no scales or biases.
const std::byte* scales_of(const Matrix& matrix) {
  return matrix.bits ? matrix.scales : matrix.weight;
}
const std::byte* biases_of(const Matrix& matrix) {
  return matrix.bits ? matrix.biases : matrix.weight;
}

Pipelines::Constants format_of(const Matrix& matrix) {
  Pipelines::Constants constants{};
  constants[kBits] = u32(matrix.bits);
  constants[kGroup] = u32(matrix.group);
  constants[kDType] = static_cast<uint32_t>(matrix.dtype);
  return constants;
}

Owned<id<MTLDevice>> open_device() {
  auto device = Owned<id<MTLDevice>>::adopt(MTLCreateSystemDefaultDevice());
  if (!device) throw DeviceError("Metal: this machine has no GPU; use backend=\"cpu\"");
  return device;
}

class MetalBackend final : public Backend {
 public:
  MetalBackend(const std::string& kernels, bool overlap)
      : overlap_(overlap),
        device_(open_device()),
        memory_(device_.get()),
        pipelines_(device_.get(), kernels),
        commands_(device_.get()) {}

  Buffer allocate(size_t bytes) override {
    const Pool pool;
    return memory_.allocate(bytes);
  }

  Buffer map(const File& file, int64_t offset, int64_t length) override {
    const Pool pool;
    return memory_.map(file, offset, length);
  }

  void embed(const Matrix& table, std::span<const int32_t> ids, float* out) override;
  void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                float* out) override;
  void matmul(int n, const float* x, std::span<const Product> products) override;
  void causal_conv(int n, const ConvCall& call) override;
  void gated_delta(int n, const DeltaCall& call) override;
  void attention(int n, const AttentionCall& call) override;
  void route(int n, int experts, int top_k, bool renormalise, const float* logits, int32_t* ids,
             float* weights) override;
  void experts(int n, const float* x, std::span<const ExpertCall> calls) override;
  void combine(int n, const CombineCall& call) override;

  void finish() override {
    const Pool pool;
    encode_waiting();
    staged_.clear();
    staging_left_ = 0;
    commands_.finish();
  }

 private:
  struct Binding {
    uint32_t index;
    const void* memory;
  };
  struct Bytes {
    uint32_t index;
    const void* data;
    size_t length;
  };

  template <class Arguments>
  static Bytes bytes(uint32_t index, const Arguments& arguments) {
    return {index, &arguments, sizeof arguments};
  }

  // Encodes a dispatch of `groups` threadgroups of `threads` threads.
  void run(Kernel kernel, const Pipelines::Constants& constants,
           std::initializer_list<Bytes> arguments, std::span<const Binding> bindings,
           MTLSize groups, uint32_t threads);
  void run(Kernel kernel, const Pipelines::Constants& constants,
           std::initializer_list<Bytes> arguments, std::initializer_list<Binding> bindings,
           MTLSize groups, uint32_t threads) {
    run(kernel, constants, arguments, std::span(bindings.begin(), bindings.size()), groups,
        threads);
  }
  void multiply(int n, const float* x, std::span<const Product* const> products);

  // Experts of one dispatch, and the buffers that they lie in.
  struct Batch {
    ExpertArguments arguments{};
    std::vector<const std::byte*> sources;  // a pointer into each
    std::vector<const ExpertCall*> calls;
  };
  void encode_waiting();
  bool add(Batch& batch, const ExpertCall& call);
  bool locate_all(Batch& batch, const ExpertCall& call, ExpertEntry& entry);
  void encode(Batch& batch);

  // Memory that a dispatch may read until finish().
  int32_t* stage(size_t count);
  // Memory that grows, for what dispatches hand on to later ones.
  template <class T>
  T* scratch(size_t which, size_t count);

  const bool overlap_;
  Owned<id<MTLDevice>> device_;
  DeviceMemory memory_;
  Pipelines pipelines_;
  Commands commands_;
};

}  // namespace
}  // namespace flashmoe
