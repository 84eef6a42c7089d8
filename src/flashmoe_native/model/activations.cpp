#include "model/activations.h"

#include <algorithm>

namespace flashmoe {

Activations::Activations(const ModelConfig& config, int chunk, const Take& take) {
  const auto rows = [&](int width, Memory memory) {
    return take(sizeof(float) * static_cast<size_t>(chunk) * static_cast<size_t>(width), memory);
  };
  const auto floats = [&](int width) { return static_cast<float*>(rows(width, Memory::kState)); };
  static_assert(sizeof(int32_t) == sizeof(float));
  const auto ints = [&](int width) {
    return static_cast<int32_t*>(rows(width, Memory::kExchange));
  };
  const int hidden = config.hidden_size, chosen = config.experts_per_token;
  const int attention = config.num_attention_heads * config.head_dim;
  const int key_values = config.num_key_value_heads * config.head_dim;

  x = floats(hidden);
  normed = floats(hidden);
  qkv = query = floats(std::max(config.conv_channels(), 2 * attention));
  z = key = floats(std::max(config.value_width(), key_values));
  value = floats(key_values);
  a = floats(config.linear_num_value_heads);
  b = floats(config.linear_num_value_heads);
  mixed = floats(std::max(config.value_width(), attention));
  router_logits = floats(config.num_experts);
  ids = ints(chosen);
  finite = ints(1);
  expert_weights = floats(chosen);
  expert_out = floats(chosen * hidden);
  shared_out = floats(hidden);
  shared_gate = floats(1);
  pair_token = ints(chosen);
  pair_row = ints(chosen);
  every = ints(1);
  const auto head_rows = static_cast<size_t>(std::min(kHeadRows, chunk));
  logits = static_cast<float*>(
      take(sizeof(float) * head_rows * static_cast<size_t>(config.vocab_size), Memory::kExchange));
}

}  // namespace flashmoe
