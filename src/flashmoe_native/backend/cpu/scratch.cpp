#include "backend/cpu/scratch.h"

#include <algorithm>
#include <array>

#include "backend/cpu/int8_inputs.h"
#include "backend/cpu/kernels.h"

namespace flashmoe {
namespace {

constexpr int kQueries = 64;        // of a unit: its scores are 64 KiB
constexpr int kUnitsPerThread = 8;  // with fewer, the keys are divided too, which takes memory
constexpr int kTasksOfRound = 64;   // of a thread, before their partial results are merged

int divide_up(int64_t value, int64_t unit) {
  return static_cast<int>((value + unit - 1) / unit);
}

}  // namespace

AttentionDivision::AttentionDivision(int n, const AttentionCall& call, int threads) {
  const int group = call.heads / call.kv_heads;
  const auto width = static_cast<size_t>(padded(call.head_dim));
  tokens = std::max(1, kQueries / group);
  units = call.kv_heads * divide_up(n, tokens);
  key_blocks = divide_up(call.position + n, kKeyBlock);
  by_keys = units < kUnitsPerThread * threads && threads > 1 && key_blocks > 1;
  round_blocks = divide_up(int64_t{kTasksOfRound} * threads, units);
  queries = static_cast<size_t>(std::min(tokens, n)) * group;
  partial_floats = queries * (2 + width);

  query_floats = static_cast<size_t>(n) * call.heads * width;
  const AttentionBlock whole{0, 0, std::min(tokens, n), 0, 0};
  thread_floats = attention_scratch(call, whole) + (by_keys ? 0 : 2 * partial_floats);
  partials = std::min(key_blocks, round_blocks + 1);
  shared_floats = by_keys ? partial_floats * units * partials : 0;
}

size_t activation_floats(const ExpertCall& call) {
  return call.tokens.size() * static_cast<size_t>(padded(call.gate.rows));
}

size_t down_input_bytes(const ExpertCall& call, Precision precision) {
  if (precision == Precision::kFloat32 || call.down.bits == 0) return 0;
  return int8_bytes(call.down, static_cast<int>(call.tokens.size()));
}

int64_t cpu_scratch_bytes(const PassShape& pass, Precision precision, int threads) {
  std::array<size_t, Int8Inputs::kFormats> inputs{};
  const auto want = [&](int n, const Matrix& weight) {
    if (precision == Precision::kFloat32 || weight.bits == 0) return;
    size_t& bytes = inputs[Int8Inputs::format(weight)];
    bytes = std::max(bytes, int8_bytes(weight, n));
  };
  for (const auto& [n, weight] : pass.products) want(n, weight);

  size_t activations = 0, down_inputs = 0;
  for (const std::vector<ExpertCall>& layer : pass.experts) {
    size_t floats = 0, bytes = 0;
    for (const ExpertCall& call : layer) {
      want(pass.tokens, call.gate);
      want(pass.tokens, call.up);
      floats += activation_floats(call);
      bytes += down_input_bytes(call, precision);
    }
    activations = std::max(activations, 2 * floats);
    down_inputs = std::max(down_inputs, bytes);
  }

  size_t queries = 0, shared = 0, thread = pass.delta ? delta_scratch(*pass.delta) : 0;
  for (int n = 1; pass.attention && n <= pass.tokens; ++n) {
    const AttentionDivision division(n, *pass.attention, threads);
    queries = std::max(queries, division.query_floats);
    shared = std::max(shared, division.shared_floats);
    thread = std::max(thread, division.thread_floats);
  }

  size_t total = down_inputs;
  for (const size_t bytes : inputs) total += bytes;
  total += sizeof(float) * (activations + queries + shared + thread * static_cast<size_t>(threads));
  return static_cast<int64_t>(total);
}

}  // namespace flashmoe
