// The architecture of a checkpoint; every number comes from its config.json.
#pragma once

#include <cstdint>
#include <vector>

namespace flashmoe {

struct ModelConfig {
  int hidden = 0;
  int vocab = 0;
  std::vector<bool> attention_layers;  // one entry a layer: true attention, false GatedDeltaNet
  float norm_eps = 0;

  int heads = 0, kv_heads = 0, head_dim = 0, rotary_dim = 0;
  float rope_theta = 0;

  int key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0, conv_kernel = 0;

  int experts = 0;
  int top_k = 0;  // experts per token in force
  bool renormalise = true;

  int layers() const { return static_cast<int>(attention_layers.size()); }
  int key_width() const { return key_heads * key_dim; }
  int value_width() const { return value_heads * value_dim; }
  int conv_channels() const { return 2 * key_width() + value_width(); }
};

}  // namespace flashmoe
