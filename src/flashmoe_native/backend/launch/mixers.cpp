// GatedDeltaNet and attention.
#include <algorithm>
#include <cmath>

#include "backend/launch/gpu_backend.h"
#include "backend/launch/helpers.h"

namespace flashmoe {

using namespace shaders;

namespace {

constexpr double kDeltaSeconds = 20e-6;  // of gated_delta for a token, one after another

}  // namespace

void GpuBackend::causal_conv(int n, const ConvCall& call) {
  Plan plan(Kernel::causal_conv, {divide_up(call.channels, kConvThreads), 1, 1}, kConvThreads,
            seconds_for(0, 8.0 * n * call.channels));
  plan.set(ConvArguments{address(call.x), address(call.weight), address(call.state_in),
                         address(call.state_out), u32(call.channels), u32(n), u32(call.kernel)});
  run(plan);
}

void GpuBackend::gated_delta(int n, const DeltaCall& call) {
  Plan plan(Kernel::gated_delta, {u32(call.value_heads), 1, 1}, delta_threads(u32(call.value_dim)),
            kDeltaSeconds * n);
  plan.set(DeltaArguments{.qkv = address(call.qkv),
                          .z = address(call.z),
                          .a = address(call.a),
                          .b = address(call.b),
                          .a_log = address(call.a_log),
                          .dt_bias = address(call.dt_bias),
                          .norm = address(call.norm),
                          .state_in = address(call.state_in),
                          .state_out = address(call.state_out),
                          .out = address(call.out),
                          .tokens = u32(n),
                          .key_heads = u32(call.key_heads),
                          .value_heads = u32(call.value_heads),
                          .key_dim = u32(call.key_dim),
                          .value_dim = u32(call.value_dim),
                          .norm_eps = call.norm_eps});
  run(plan);
}

void GpuBackend::attention(int n, const AttentionCall& call) {
  const int64_t width = int64_t{call.heads} * call.head_dim;  // floats of a token
  const int64_t float_size = sizeof(float);
  AttentionArguments arguments{
      .q_gate = address(call.q_gate),
      .k = address(call.k),
      .v = address(call.v),
      .q_norm = address(call.q_norm),
      .k_norm = address(call.k_norm),
      .queries = scratch(Scratch::kQueries, static_cast<size_t>(n * width * float_size)),
      .keys = address(call.keys),
      .values = address(call.values),
      .partial = 0,
      .totals = 0,
      .out = address(call.out),
      .capacity = static_cast<uint64_t>(call.capacity),
      .position = u32(call.position),
      .tokens = u32(n),
      .heads = u32(call.heads),
      .kv_heads = u32(call.kv_heads),
      .head_dim = u32(call.head_dim),
      .rotary_dim = u32(call.rotary_dim),
      .keys_per_split = 0,
      .splits = 0,
      .norm_eps = call.norm_eps,
      .frequencies = {}};
  for (int i = 0; i < call.rotary_dim / 2; ++i) {
    const double exponent = 2.0 * i / call.rotary_dim;
    arguments.frequencies[i] = static_cast<float>(std::pow(double{call.rope_theta}, -exponent));
  }
  Plan plan(Kernel::attention_append, {1, 1, 1}, kAttentionThreads,
            seconds_for(0, 16.0 * n * width));
  plan.constants[kCacheDType] = static_cast<uint32_t>(call.cache_dtype);
  plan.grid = {divide_up(int64_t{n} * (call.heads + call.kv_heads), kAttentionRows), 1, 1};
  plan.set(arguments);
  run(plan);

  // So many queries at a time that a dispatch does not take too long.
  const double cache_bytes =
      2.0 * call.kv_heads * call.head_dim * static_cast<double>(size_of(call.cache_dtype));
  const double of_token = 4.0 * static_cast<double>(width * (call.position + n));
  const int slice = static_cast<int>(
      std::clamp(tuning().longest_seconds / seconds_for(of_token, 0), 1.0, double{1} * n));
  for (int first = 0; first < n; first += slice) {
    const int count = std::min(slice, n - first);
    const int64_t position = call.position + first, keys = position + count;
    const uint32_t rows = u32(int64_t{count} * call.heads);
    const uint32_t row_blocks = divide_up(rows / u32(call.kv_heads), kSplitRows);
    const uint32_t wanted = divide_up(tuning().enough_groups, int64_t{row_blocks} * call.kv_heads);
    arguments.keys_per_split =
        std::max(u32(tuning().least_keys), round_up(divide_up(keys, wanted), kSplitKeys));
    arguments.splits = divide_up(keys, arguments.keys_per_split);
    arguments.position = u32(position);
    arguments.tokens = u32(count);
    const bool several = arguments.splits > 1;
    if (several) {
      const size_t floats = size_t{arguments.splits} * rows;
      arguments.partial = scratch(Scratch::kPartial, floats * u32(call.head_dim) * sizeof(float));
      arguments.totals = scratch(Scratch::kTotals, 2 * floats * sizeof(float));
    }
    plan.kernel = Kernel::attention_split;
    plan.grid = {u32(call.kv_heads), row_blocks, arguments.splits};
    plan.seconds = seconds_for(of_token * count, cache_bytes * static_cast<double>(keys));
    plan.set(arguments);
    run(plan);
    if (several) {
      plan.kernel = Kernel::attention_merge;
      plan.grid = {divide_up(rows, kAttentionRows), 1, 1};
      plan.seconds = seconds_for(0, 4.0 * arguments.splits * rows * call.head_dim);
      run(plan);
    }
    arguments.q_gate += u32(2 * count * width * float_size);
    arguments.queries += u32(count * width * float_size);
    arguments.out += u32(count * width * float_size);
  }
}

}  // namespace flashmoe
