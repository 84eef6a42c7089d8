// What every token needs, resident in memory, by layer.
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/spec.h"
#include "model/config.h"

namespace flashmoe {

struct DeltaWeights {
  Matrix in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj;
  const float* conv1d = nullptr;  // [kernel, channels]
  const float* a_log = nullptr;
  const float* dt_bias = nullptr;
  const float* norm = nullptr;
};

struct AttentionWeights {
  Matrix q_proj, k_proj, v_proj, o_proj;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
};

struct LayerWeights {
  const float* input_layernorm = nullptr;
  const float* post_attention_layernorm = nullptr;
  DeltaWeights linear_attn;    // of a GatedDeltaNet layer
  AttentionWeights self_attn;  // of an attention layer
  Matrix router;
  Matrix shared_gate_proj, shared_up_proj, shared_down_proj;
  Matrix shared_expert_gate;  // [1, hidden]
};

struct Weights {
  Matrix embed_tokens;
  Matrix lm_head;  // embed_tokens itself where they are tied
  const float* norm = nullptr;
  std::vector<LayerWeights> layers;
};

// Gives weights by their canonical names (docs/checkpoints.md). Throws CheckpointError for a name
// that there is not.
class WeightSource {
 public:
  explicit WeightSource(const CheckpointSpec& spec) : spec_(spec) {}
  virtual ~WeightSource() = default;

  bool has_matrix(const std::string& name) const { return spec_.matrices.contains(name); }
  virtual Matrix matrix(const std::string& name) = 0;
  // A tensor as float32.
  virtual const float* vector(const std::string& name) = 0;
  // A depthwise convolution [channels, kernel] as [kernel, channels].
  virtual const float* taps(const std::string& name, int channels, int kernel) = 0;

 protected:
  const MatrixSpec& find_matrix(const std::string& name) const;
  const VectorSpec& find_vector(const std::string& name) const;

  const CheckpointSpec& spec_;
};

// Every resident weight of the architecture, each asked for once.
Weights get_weights(WeightSource& from, const ModelConfig& config);

}  // namespace flashmoe
