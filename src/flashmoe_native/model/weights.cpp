#include "model/weights.h"

#include "core/error.h"

namespace flashmoe {
namespace {

template <typename Specs>
const auto& find(const Specs& specs, const std::string& name) {
  const auto found = specs.find(name);
  if (found == specs.end()) throw CheckpointError("the checkpoint has no tensor " + name);
  return found->second;
}

DeltaWeights get_linear_attn(WeightSource& from, const std::string& prefix,
                             const ModelConfig& config) {
  DeltaWeights w;
  w.in_proj_qkv = from.matrix(prefix + "in_proj_qkv");
  w.in_proj_z = from.matrix(prefix + "in_proj_z");
  w.in_proj_b = from.matrix(prefix + "in_proj_b");
  w.in_proj_a = from.matrix(prefix + "in_proj_a");
  w.out_proj = from.matrix(prefix + "out_proj");
  w.conv1d = from.taps(prefix + "conv1d", config.conv_channels(), config.linear_conv_kernel_dim);
  w.a_log = from.vector(prefix + "A_log");
  w.dt_bias = from.vector(prefix + "dt_bias");
  w.norm = from.vector(prefix + "norm");
  return w;
}

AttentionWeights get_self_attn(WeightSource& from, const std::string& prefix) {
  AttentionWeights w;
  w.q_proj = from.matrix(prefix + "q_proj");
  w.k_proj = from.matrix(prefix + "k_proj");
  w.v_proj = from.matrix(prefix + "v_proj");
  w.o_proj = from.matrix(prefix + "o_proj");
  w.q_norm = from.vector(prefix + "q_norm");
  w.k_norm = from.vector(prefix + "k_norm");
  return w;
}

}  // namespace

const MatrixSpec& WeightSource::find_matrix(const std::string& name) const {
  return find(spec_.matrices, name);
}

const VectorSpec& WeightSource::find_vector(const std::string& name) const {
  return find(spec_.vectors, name);
}

Weights get_weights(WeightSource& from, const ModelConfig& config) {
  Weights result;
  result.embed_tokens = from.matrix("embed_tokens");
  result.lm_head = from.has_matrix("lm_head") ? from.matrix("lm_head") : result.embed_tokens;
  result.norm = from.vector("norm");
  for (int layer = 0; layer < config.layers(); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    LayerWeights w;
    w.input_layernorm = from.vector(prefix + "input_layernorm");
    w.post_attention_layernorm = from.vector(prefix + "post_attention_layernorm");
    if (config.attention_layers[layer]) {
      w.self_attn = get_self_attn(from, prefix + "self_attn.");
    } else {
      w.linear_attn = get_linear_attn(from, prefix + "linear_attn.", config);
    }
    w.router = from.matrix(prefix + "mlp.gate");
    w.shared_gate_proj = from.matrix(prefix + "mlp.shared_expert.gate_proj");
    w.shared_up_proj = from.matrix(prefix + "mlp.shared_expert.up_proj");
    w.shared_down_proj = from.matrix(prefix + "mlp.shared_expert.down_proj");
    w.shared_expert_gate = from.matrix(prefix + "mlp.shared_expert_gate");
    result.layers.push_back(w);
  }
  return result;
}

}  // namespace flashmoe
