// What each operation binds and how its grid is divided. metal/arguments.h says what the kernels
// want.
#include "backend/metal/metal_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "backend/metal/commands.h"
#include "backend/metal/memory.h"
#include "backend/metal/pipelines.h"
#include "core/error.h"

namespace flashmoe {
namespace {

using namespace shaders;

constexpr int kDecodeTokens = 4;     // of a weight, up to which reading it once a token is cheapest
constexpr uint32_t kLeastKeys = 64;  // of a split of attention: fewer are not worth merging
constexpr uint32_t kEnoughGroups = 128;  // threadgroups that occupy a whole GPU
constexpr uint32_t kThreads = 256;  // of a threadgroup where the kernel has no number of its own

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

void require(bool holds, const std::string& what) {
  if (!holds) throw DeviceError("Metal: no kernel for " + what + "; use backend=\"cpu\"");
}

bool same_format(const Matrix& a, const Matrix& b) {
  return a.bits == b.bits && a.group == b.group && a.dtype == b.dtype;
}

using Constants = Pipelines::Constants;

Constants format_of(const Matrix& matrix) {
  Constants constants{};
  constants[kBits] = u32(matrix.bits);
  constants[kGroup] = u32(matrix.group);
  constants[kDType] = static_cast<uint32_t>(matrix.dtype);
  return constants;
}

// A dense matrix binds its weight where a quantised one has scales and biases.
const std::byte* scales_of(const Matrix& matrix) {
  return matrix.bits ? matrix.scales : matrix.weight;
}

const std::byte* biases_of(const Matrix& matrix) {
  return matrix.bits ? matrix.biases : matrix.weight;
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

  int weight_alignment() const override { return DeviceMemory::kWeightAlignment; }

  Buffer map(const File& file, int64_t offset, int64_t length) override {
    const Pool pool;
    return memory_.map(file, offset, length);
  }

  void embed(const Matrix& table, std::span<const int32_t> ids, float* out) override {
    int32_t* staged = stage(ids.size());
    std::copy(ids.begin(), ids.end(), staged);
    const EmbedArguments arguments{u32(table.cols)};
    run(Kernel::embed, format_of(table), {bytes(kEmbedArguments, arguments)},
        {{kEmbedIds, staged},
         {kEmbedWeight, table.weight},
         {kEmbedScales, scales_of(table)},
         {kEmbedBiases, biases_of(table)},
         {kEmbedOut, out}},
        MTLSizeMake(divide_up(table.cols, kThreads), ids.size(), 1), kThreads);
  }

  void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                float* out) override {
    const NormArguments arguments{u32(width), eps};
    run(Kernel::rms_norm, {}, {bytes(kNormArguments, arguments)},
        {{kNormX, x}, {kNormWeight, weight}, {kNormOut, out}}, MTLSizeMake(u32(n), 1, 1),
        kNormThreads);
  }

  void matmul(int n, const float* x, std::span<const Product> products) override;

  void causal_conv(int n, const ConvCall& call) override {
    require(call.kernel <= static_cast<int>(kMaxConvTaps),
            "convolutions of " + std::to_string(call.kernel) + " taps");
    const ConvArguments arguments{u32(call.channels), u32(n), u32(call.kernel)};
    run(Kernel::causal_conv, {}, {bytes(kConvArguments, arguments)},
        {{kConvX, call.x},
         {kConvWeight, call.weight},
         {kConvStateIn, call.state_in},
         {kConvStateOut, call.state_out}},
        MTLSizeMake(divide_up(call.channels, kThreads), 1, 1), kThreads);
  }

  void gated_delta(int n, const DeltaCall& call) override {
    require(call.key_dim % 4 == 0 &&
                std::max(call.key_dim, call.value_dim) <= static_cast<int>(kMaxDeltaDim),
            "GatedDeltaNet heads of " + std::to_string(call.key_dim) + " by " +
                std::to_string(call.value_dim));
    const DeltaArguments arguments{u32(n),
                                   u32(call.key_heads),
                                   u32(call.value_heads),
                                   u32(call.key_dim),
                                   u32(call.value_dim),
                                   call.norm_eps};
    run(Kernel::gated_delta, {}, {bytes(kDeltaArguments, arguments)},
        {{kDeltaQkv, call.qkv},
         {kDeltaZ, call.z},
         {kDeltaA, call.a},
         {kDeltaB, call.b},
         {kDeltaALog, call.a_log},
         {kDeltaDtBias, call.dt_bias},
         {kDeltaNorm, call.norm},
         {kDeltaStateIn, call.state_in},
         {kDeltaStateOut, call.state_out},
         {kDeltaOut, call.out}},
        MTLSizeMake(u32(call.value_heads), 1, 1), delta_threads(u32(call.value_dim)));
  }

  void attention(int n, const AttentionCall& call) override;

  void route(int n, int experts, int experts_per_token, bool renormalise, const float* logits,
             int32_t* ids, float* weights) override {
    require(experts <= static_cast<int>(kMaxRouted) &&
                experts_per_token <= static_cast<int>(kMaxChosen),
            "routing to " + std::to_string(experts_per_token) + " of " + std::to_string(experts) +
                " experts");
    const RouteArguments arguments{u32(experts), u32(experts_per_token), renormalise ? 1u : 0u};
    run(Kernel::route, {}, {bytes(kRouteArguments, arguments)},
        {{kRouteLogits, logits}, {kRouteIds, ids}, {kRouteWeights, weights}},
        MTLSizeMake(u32(n), 1, 1), kSimdWidth);
  }

  void experts(int, const float* x, std::span<const ExpertCall> calls) override {
    waiting_.insert(waiting_.end(), calls.begin(), calls.end());
    waiting_x_ = x;
    if (!overlap_) return;
    encode_waiting();
    commands_.commit();
  }

  void combine(int n, const CombineCall& call) override {
    const bool norm = call.norm_weight != nullptr;
    const CombineArguments arguments{u32(call.hidden), u32(call.experts_per_token), norm ? 1u : 0u,
                                     call.norm_eps};
    run(Kernel::combine, {}, {bytes(kCombineArguments, arguments)},
        {{kCombineExpertOut, call.expert_out},
         {kCombineExpertWeights, call.expert_weights},
         {kCombineSharedOut, call.shared_out},
         {kCombineSharedGate, call.shared_gate},
         {kCombineX, call.x},
         {kCombineNormWeight, norm ? call.norm_weight : call.x},
         {kCombineNormed, norm ? call.normed : call.x}},
        MTLSizeMake(u32(n), 1, 1), kCombineThreads);
  }

  void finish() override {
    const Pool pool;
    encode_waiting();
    commands_.finish();
    staging_.used = 0;
    full_staging_.clear();
  }

 private:
  struct Bytes {  // an argument struct
    uint32_t index;
    const void* data;
    size_t length;
  };
  struct Binding {  // a pointer into the backend's memory
    uint32_t index;
    const void* pointer;
  };
  struct Scratch {
    Buffer memory;
    size_t size = 0, used = 0;
  };
  struct Batch {  // experts of one dispatch
    ExpertArguments arguments{};
    std::vector<const std::byte*> sources;
    std::vector<const ExpertCall*> calls;
  };

  template <class Arguments>
  static Bytes bytes(uint32_t index, const Arguments& arguments) {
    return {index, &arguments, sizeof arguments};
  }

  // Encodes a dispatch of `groups` threadgroups of `threads` threads.
  void run(Kernel kernel, const Constants& constants, const std::vector<Bytes>& arguments,
           const std::vector<Binding>& bindings, MTLSize groups, uint32_t threads);

  void multiply(int n, const float* x, std::span<const Product* const> products);
  void encode_waiting();
  bool add(Batch& batch, const ExpertCall& call) const;
  void encode(Batch& batch);

  // Memory that is written now and read by a dispatch; it stays until finish().
  int32_t* stage(size_t count);
  // Memory in which a dispatch leaves something for the next. What it replaces stays as long as a
  // command buffer refers to it.
  float* floats(Scratch& scratch, size_t count);

  const bool overlap_;
  Owned<id<MTLDevice>> device_;
  DeviceMemory memory_;
  Pipelines pipelines_;
  Commands commands_;
  Scratch staging_;
  std::vector<Buffer> full_staging_;
  Scratch queries_, partials_, totals_, activations_;
  std::vector<ExpertCall> waiting_;  // asked for but not encoded
  const float* waiting_x_ = nullptr;
};

void MetalBackend::run(Kernel kernel, const Constants& constants,
                       const std::vector<Bytes>& arguments, const std::vector<Binding>& bindings,
                       MTLSize groups, uint32_t threads) {
  const Pool pool;
  encode_waiting();
  id<MTLComputePipelineState> pipeline = pipelines_.get(kernel, constants, threads);
  id<MTLComputeCommandEncoder> encoder = commands_.encoder();
  [encoder setComputePipelineState:pipeline];
  for (const Bytes& argument : arguments) {
    [encoder setBytes:argument.data length:argument.length atIndex:argument.index];
  }
  for (const Binding& binding : bindings) {
    const DeviceMemory::Place place = memory_.find(binding.pointer);
    [encoder setBuffer:place.buffer offset:place.offset atIndex:binding.index];
  }
  [encoder dispatchThreadgroups:groups threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
}

float* MetalBackend::floats(Scratch& scratch, size_t count) {
  const size_t wanted = count * sizeof(float);
  if (wanted > scratch.size) {
    scratch.size = std::max(wanted, scratch.size + scratch.size / 2);
    scratch.memory = allocate(scratch.size);
  }
  return reinterpret_cast<float*>(scratch.memory.get());
}

int32_t* MetalBackend::stage(size_t count) {
  const size_t wanted = round_up(static_cast<int64_t>(count * sizeof(int32_t)), 16);
  if (staging_.used + wanted > staging_.size) {
    full_staging_.push_back(std::move(staging_.memory));
    staging_.size = std::max(2 * staging_.size, wanted);
    staging_.memory = allocate(staging_.size);
    staging_.used = 0;
  }
  std::byte* result = staging_.memory.get() + staging_.used;
  staging_.used += wanted;
  return reinterpret_cast<int32_t*>(result);
}

void MetalBackend::matmul(int n, const float* x, std::span<const Product> products) {
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

// Products of one format.
void MetalBackend::multiply(int n, const float* x, std::span<const Product* const> products) {
  const Matrix& first = *products[0]->weight;
  const bool decode = n <= kDecodeTokens;
  int64_t rows = 0;
  for (const Product* product : products) rows += product->weight->rows;
  Constants constants = format_of(first);
  if (decode) constants[kQuads] = matvec_quads(u32(rows));
  const uint32_t block = decode ? matvec_block_rows(constants[kQuads]) : u32(kTileRows);
  ProductArguments arguments{};
  arguments.columns = u32(first.cols);
  arguments.tokens = u32(n);
  arguments.count = u32(static_cast<int64_t>(products.size()));
  std::vector<Binding> bindings{{kProductX, x}};
  for (uint32_t i = 0; i < kMaxProducts; ++i) {
    // Indices beyond the last product are bound to it.
    const Product& product = *products[std::min<size_t>(i, products.size() - 1)];
    const Matrix& weight = *product.weight;
    bindings.push_back({kProductWeight + i, weight.weight});
    bindings.push_back({kProductScales + i, scales_of(weight)});
    bindings.push_back({kProductBiases + i, biases_of(weight)});
    bindings.push_back({kProductOut + i, product.out});
    if (i >= products.size()) continue;
    arguments.rows[i] = u32(weight.rows);
    arguments.add[i] = product.add ? 1 : 0;
    arguments.first_block[i + 1] = arguments.first_block[i] + divide_up(weight.rows, block);
  }
  const uint32_t blocks = arguments.first_block[products.size()];
  run(decode ? Kernel::matvec : Kernel::matmul, constants, {bytes(kProductArguments, arguments)},
      bindings, MTLSizeMake(blocks, decode ? u32(n) : divide_up(n, kTileTokens), 1),
      decode ? u32(kMatvecThreads) : u32(kTileThreads));
}

void MetalBackend::attention(int n, const AttentionCall& call) {
  require(call.head_dim % 32 == 0 && call.head_dim <= static_cast<int>(kMaxHeadDim),
          "attention heads of " + std::to_string(call.head_dim));
  constexpr uint32_t kAppendRows = 4, kAttentionThreads = 128;  // of a threadgroup
  const uint32_t rows = u32(int64_t{n} * call.heads);
  const uint32_t row_blocks = divide_up(rows / u32(call.kv_heads), kSplitRows);
  const int64_t keys = call.position + n;
  const uint32_t wanted = divide_up(kEnoughGroups, int64_t{row_blocks} * call.kv_heads);
  const uint32_t split = std::max(kLeastKeys, round_up(divide_up(keys, wanted), kSplitKeys));

  AttentionArguments arguments{};
  arguments.capacity = static_cast<uint64_t>(call.capacity);
  arguments.position = u32(call.position);
  arguments.tokens = u32(n);
  arguments.heads = u32(call.heads);
  arguments.kv_heads = u32(call.kv_heads);
  arguments.head_dim = u32(call.head_dim);
  arguments.rotary_dim = u32(call.rotary_dim);
  arguments.keys_per_split = split;
  arguments.splits = divide_up(keys, split);
  arguments.norm_eps = call.norm_eps;

  std::vector<float> frequencies(static_cast<size_t>(call.rotary_dim) / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / call.rotary_dim;
    frequencies[i] = static_cast<float>(std::pow(double{call.rope_theta}, -exponent));
  }

  const size_t width = size_t{rows} * u32(call.head_dim);
  float* queries = floats(queries_, width);
  float* partials = floats(partials_, arguments.splits * width);
  float* totals = floats(totals_, size_t{2} * arguments.splits * rows);
  Constants constants{};
  constants[kCacheDType] = static_cast<uint32_t>(call.cache_dtype);
  const Bytes own = bytes(kAttentionArguments, arguments);

  run(Kernel::attention_append, constants,
      {own, {kAttentionFrequencies, frequencies.data(), frequencies.size() * sizeof(float)}},
      {{kAttentionQGate, call.q_gate},
       {kAttentionK, call.k},
       {kAttentionV, call.v},
       {kAttentionQNorm, call.q_norm},
       {kAttentionKNorm, call.k_norm},
       {kAttentionQueries, queries},
       {kAttentionKeys, call.keys},
       {kAttentionValues, call.values}},
      MTLSizeMake(divide_up(int64_t{n} * (call.heads + call.kv_heads), kAppendRows), 1, 1),
      kAttentionThreads);
  run(Kernel::attention_split, constants, {own},
      {{kAttentionQGate, call.q_gate},
       {kAttentionQueries, queries},
       {kAttentionKeys, call.keys},
       {kAttentionValues, call.values},
       {kAttentionPartial, partials},
       {kAttentionTotals, totals},
       {kAttentionOut, call.out}},
      MTLSizeMake(u32(call.kv_heads), row_blocks, arguments.splits), kAttentionThreads);
  if (arguments.splits == 1) return;
  run(Kernel::attention_merge, {}, {own},
      {{kAttentionQGate, call.q_gate},
       {kAttentionPartial, partials},
       {kAttentionTotals, totals},
       {kAttentionOut, call.out}},
      MTLSizeMake(divide_up(rows, kAppendRows), 1, 1), kAttentionThreads);
}

void MetalBackend::encode_waiting() {
  const std::vector<ExpertCall> calls = std::exchange(waiting_, {});
  for (auto call = calls.begin(); call != calls.end();) {
    Batch batch;
    while (call != calls.end() && add(batch, *call)) ++call;
    encode(batch);
  }
}

// Takes the expert into the dispatch, or says that it needs another one.
bool MetalBackend::add(Batch& batch, const ExpertCall& call) const {
  if (!batch.calls.empty()) {
    const ExpertCall& first = *batch.calls.front();
    if (batch.calls.size() == kMaxExperts || !same_format(call.gate, first.gate) ||
        !same_format(call.up, first.up) || !same_format(call.down, first.down)) {
      return false;
    }
  }
  std::vector<const std::byte*> sources = batch.sources;
  const auto location = [&](const void* pointer) {
    const std::byte* base = memory_.base(pointer);
    const auto source = std::find(sources.begin(), sources.end(), base);
    const auto index = u32(source - sources.begin());
    if (source == sources.end()) sources.push_back(base);
    return locate(index, static_cast<uint64_t>(static_cast<const std::byte*>(pointer) - base));
  };
  const auto stored = [&](const Matrix& matrix) {
    return StoredMatrix{location(matrix.weight), location(scales_of(matrix)),
                        location(biases_of(matrix))};
  };
  ExpertArguments& arguments = batch.arguments;
  const ExpertEntry entry{stored(call.gate),  stored(call.up),     stored(call.down),
                          location(call.out), u32(call.gate.rows), arguments.pairs};
  if (sources.size() > kMaxSources) return false;
  arguments.experts[arguments.count++] = entry;
  arguments.hidden = u32(call.gate.cols);
  arguments.pairs += u32(static_cast<int64_t>(call.tokens.size()));
  arguments.stride = std::max(arguments.stride, round_up(call.gate.rows, 4));
  batch.sources = std::move(sources);
  batch.calls.push_back(&call);
  return true;
}

void MetalBackend::encode(Batch& batch) {
  const ExpertArguments& arguments = batch.arguments;
  int32_t* tokens = stage(arguments.pairs);
  int32_t* rows = stage(arguments.pairs);
  uint32_t tiles = 0, widest = 0, pair = 0;
  for (const ExpertCall* call : batch.calls) {
    std::copy(call->tokens.begin(), call->tokens.end(), tokens + pair);
    std::copy(call->out_rows.begin(), call->out_rows.end(), rows + pair);
    pair += u32(static_cast<int64_t>(call->tokens.size()));
    tiles += divide_up(static_cast<int64_t>(call->tokens.size()), kTileTokens);
    widest = std::max(widest, u32(call->gate.rows));
  }
  const bool decode = arguments.pairs <= kDecodeTokens * arguments.count;
  const uint32_t threads = decode ? u32(kMatvecThreads) : u32(kTileThreads);
  const auto grid = [&](uint32_t rows, uint32_t decode_rows) {
    return MTLSizeMake(divide_up(rows, decode ? decode_rows : u32(kTileRows)),
                       decode ? arguments.pairs : tiles, 1);
  };
  const Bytes own = bytes(kExpertArguments, arguments);
  float* activations = floats(activations_, size_t{arguments.pairs} * arguments.stride);
  std::vector<Binding> bindings{{kExpertX, waiting_x_},
                                {kExpertPairTokens, tokens},
                                {kExpertPairRows, rows},
                                {kExpertActivations, activations}};
  for (uint32_t i = 0; i < kMaxSources; ++i) {
    // Indices beyond the last source are bound to it.
    bindings.push_back(
        {kExpertSources + i, batch.sources[std::min<size_t>(i, batch.sources.size() - 1)]});
  }

  const ExpertCall& first = *batch.calls.front();
  Constants gate_up = format_of(first.gate), down = format_of(first.down);
  const Constants up = format_of(first.up);
  gate_up[kSecondBits] = up[kBits];
  gate_up[kSecondGroup] = up[kGroup];
  gate_up[kSecondDType] = up[kDType];
  if (decode) {
    gate_up[kQuads] = matvec_quads(2 * widest * arguments.pairs);
    down[kQuads] = matvec_quads(arguments.hidden * arguments.pairs);
  }
  run(decode ? Kernel::experts_gate_up : Kernel::experts_gate_up_tiles, gate_up, {own}, bindings,
      grid(widest, matvec_block_rows(gate_up[kQuads]) / 2), threads);
  run(decode ? Kernel::experts_down : Kernel::experts_down_tiles, down, {own}, bindings,
      grid(arguments.hidden, matvec_block_rows(down[kQuads])), threads);
}

}  // namespace

std::unique_ptr<Backend> make_metal_backend(const std::string& kernels, bool overlap) {
  const Pool pool;
  return std::make_unique<MetalBackend>(kernels, overlap);
}

}  // namespace flashmoe
