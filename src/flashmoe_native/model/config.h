// The architecture of a checkpoint; every number comes from its config.json, and has its name there
// unless it says otherwise.
#pragma once

#include <cstdint>
#include <vector>

namespace flashmoe {

struct ModelConfig {
  int hidden_size = 0, vocab_size = 0;
  std::vector<bool> attention_layers;  // one entry a layer: true attention, false GatedDeltaNet
  float rms_norm_eps = 0;

  int num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0, rotary_dim = 0;
  float rope_theta = 0;

  int linear_num_key_heads = 0, linear_num_value_heads = 0;
  int linear_key_head_dim = 0, linear_value_head_dim = 0, linear_conv_kernel_dim = 0;

  int num_experts = 0;
  int experts_per_token = 0;  // in force: at most the model's own num_experts_per_tok
  bool norm_topk_prob = true;

  int layers() const { return static_cast<int>(attention_layers.size()); }
  int key_width() const { return linear_num_key_heads * linear_key_head_dim; }
  int value_width() const { return linear_num_value_heads * linear_value_head_dim; }
  int conv_channels() const { return 2 * key_width() + value_width(); }
};

}  // namespace flashmoe
