// What kernels there are, norm, embedding, and products of one input with several matrices.
#include <algorithm>
#include <iterator>
#include <string>

#include "backend/launch/gpu_backend.h"
#include "backend/launch/helpers.h"
#include "core/error.h"

namespace flashmoe {

using namespace shaders;

namespace {

static_assert(static_cast<uint32_t>(DType::F32) == kF32 &&
              static_cast<uint32_t>(DType::F16) == kF16 &&
              static_cast<uint32_t>(DType::BF16) == kBF16);

}  // namespace

#define FLASHMOE_KERNEL(name) #name,
const char* name_of(Kernel kernel) {
  static constexpr const char* kNames[] = {FLASHMOE_KERNELS(FLASHMOE_KERNEL)};
  return kNames[static_cast<size_t>(kernel)];
}
#undef FLASHMOE_KERNEL

std::string spell(Kernel kernel, const Constants& constants) {
  static constexpr const char* kTypes[] = {"F32", "F16", "BF16"};
  static constexpr const char* kNames[] = {"bits",     "group",    "dtype",       "up bits",
                                           "up group", "up dtype", "cache dtype", "quads"};
  static_assert(std::size(kNames) == kFunctionConstants);
  std::string text = name_of(kernel);
  for (size_t i = 0; i < constants.size(); ++i) {
    if (constants[i] == 0) continue;
    const bool type = i == kDType || i == kSecondDType || i == kCacheDType;
    text += std::string(", ") + kNames[i] + " ";
    text += type ? kTypes[constants[i]] : std::to_string(constants[i]);
  }
  return text;
}

// Experts that wait come before what is launched after them.
void GpuBackend::run(const Plan& plan) {
  launch_waiting();
  launch(plan);
}

Stored GpuBackend::stored(const Matrix& matrix) {
  if (matrix.bits == 0) return {address(matrix.weight), 0, 0};
  return {address(matrix.weight), address(matrix.scales), address(matrix.biases)};
}

void GpuBackend::require(const Shapes& shapes) const {
  const auto kernel = [](bool there, const std::string& what) {
    if (!there) throw DeviceError("GPU: no kernel for " + what + "; use backend=\"cpu\"");
  };
  const auto text = [](int number) { return std::to_string(number); };
  kernel(shapes.conv_taps <= static_cast<int>(kMaxConvTaps),
         "convolutions of " + text(shapes.conv_taps) + " taps");
  kernel(shapes.key_dim % 4 == 0 &&
             std::max(shapes.key_dim, shapes.value_dim) <= static_cast<int>(kMaxDeltaDim),
         "GatedDeltaNet heads of " + text(shapes.key_dim) + " by " + text(shapes.value_dim));
  kernel(shapes.head_dim % 32 == 0 && shapes.head_dim <= static_cast<int>(kMaxHeadDim),
         "attention heads of " + text(shapes.head_dim));
  kernel(
      shapes.experts <= static_cast<int>(kMaxRouted) &&
          shapes.experts_per_token <= static_cast<int>(kMaxChosen),
      "routing to " + text(shapes.experts_per_token) + " of " + text(shapes.experts) + " experts");
}

void GpuBackend::all_finite(int n, int width, const float* x, int32_t* finite) {
  Plan plan(Kernel::all_finite, {u32(n), 1, 1}, kSimdWidth, seconds_for(0, 4.0 * n * width));
  plan.set(FiniteArguments{address(x), address(finite), u32(width)});
  run(plan);
}

void GpuBackend::embed(const Matrix& table, std::span<const int32_t> ids, float* out) {
  Plan plan(Kernel::embed, {divide_up(table.cols, kEmbedThreads), u32(ids.size()), 1},
            kEmbedThreads, seconds_for(0, 8.0 * table.cols * ids.size()));
  plan.constants = format_of(table);
  plan.set(EmbedArguments{stage(ids), stored(table), address(out), u32(table.cols)});
  run(plan);
}

void GpuBackend::rms_norm(int n, int width, const float* x, const float* weight, float eps,
                          float* out) {
  Plan plan(Kernel::rms_norm, {u32(n), 1, 1}, kNormThreads, seconds_for(0, 12.0 * n * width));
  plan.set(NormArguments{address(x), address(weight), address(out), u32(width), eps});
  run(plan);
}

void GpuBackend::matmul(int n, const float* x, std::span<const Product> products) {
  std::vector<const Product*> rest;
  for (const Product& product : products) rest.push_back(&product);
  while (!rest.empty()) {
    const Matrix& first = *rest.front()->weight;
    const auto others = std::partition(
        rest.begin(), rest.end(), [&](const Product* p) { return same_format(*p->weight, first); });
    const size_t count = std::min<size_t>(kMaxProducts, others - rest.begin());
    multiply(n, x, {rest.data(), count});
    rest.erase(rest.begin(), rest.begin() + static_cast<ptrdiff_t>(count));
  }
}

// Products of one format, so many tokens at a time that a dispatch does not take too long.
void GpuBackend::multiply(int n, const float* x, std::span<const Product* const> products) {
  double cells = 0;
  for (const Product* p : products) cells += double{1} * p->weight->rows * p->weight->cols;
  const double most = tuning_.longest_seconds / seconds_for(2 * cells * u32(kTileTokens), 0);
  const int slice = static_cast<int>(std::clamp(most, 1.0, 1e6)) * kTileTokens;
  for (int first = 0; first < n; first += slice) {
    multiply_slice(first, std::min(slice, n - first), x, products);
  }
}

void GpuBackend::multiply_slice(int first, int n, const float* x,
                                std::span<const Product* const> products) {
  const Matrix& format = *products[0]->weight;
  const bool decode = n <= tuning_.decode_tokens;
  int64_t rows = 0;
  double bytes = 0;
  for (const Product* product : products) {
    rows += product->weight->rows;
    bytes += bytes_of(*product->weight);
  }
  Plan plan(decode ? Kernel::matvec : Kernel::matmul, {1, 1, 1},
            decode ? u32(kMatvecThreads) : u32(kTileThreads),
            seconds_for(2.0 * rows * format.cols * n, bytes * (decode ? n : 1)));
  plan.constants = format_of(format);
  if (decode) plan.constants[kQuads] = quads(rows);
  const uint32_t block = decode ? matvec_block_rows(plan.constants[kQuads]) : u32(kTileRows);
  ProductArguments arguments{.x = address(x + int64_t{first} * format.cols),
                             .columns = u32(format.cols),
                             .tokens = u32(n),
                             .count = u32(products.size()),
                             .products = {}};
  uint32_t blocks = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const Matrix& weight = *products[i]->weight;
    float* out = products[i]->out + int64_t{first} * weight.rows;
    arguments.products[i] = {stored(weight), address(out), u32(weight.rows),
                             products[i]->add ? 1u : 0u, blocks};
    blocks += divide_up(weight.rows, block);
  }
  plan.grid = {blocks, decode ? u32(n) : divide_up(n, kTileTokens), 1};
  plan.set(arguments);
  run(plan);
}

}  // namespace flashmoe
