// What every token needs, resident in the backend's memory, by layer.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/file.h"
#include "core/io_queue.h"
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

// Called with (bytes read, bytes in all) while loading; may throw to stop.
using Progress = std::function<void(int64_t, int64_t)>;

class Weights {
 public:
  // Reads every resident tensor. Throws ReadError, and CheckpointError where a value is not finite.
  Weights(Backend& backend, IoQueue& io, const std::vector<std::unique_ptr<File>>& files,
          const CheckpointSpec& spec, const ModelConfig& config, const Progress& progress);

  Matrix embed_tokens;
  Matrix lm_head;  // embed_tokens itself where they are tied
  const float* norm = nullptr;
  std::vector<LayerWeights> layers;
  int64_t bytes = 0;
  bool mapped = false;  // some are pages of their files

 private:
  std::vector<Buffer> buffers_;
};

}  // namespace flashmoe
