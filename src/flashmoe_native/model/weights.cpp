#include "model/weights.h"

#include "model/loader.h"

namespace flashmoe {
namespace {

DeltaWeights load_linear_attn(Loader& load, const std::string& prefix, const ModelConfig& config) {
  DeltaWeights w;
  w.in_proj_qkv = load.matrix(prefix + "in_proj_qkv");
  w.in_proj_z = load.matrix(prefix + "in_proj_z");
  w.in_proj_b = load.matrix(prefix + "in_proj_b");
  w.in_proj_a = load.matrix(prefix + "in_proj_a");
  w.out_proj = load.matrix(prefix + "out_proj");
  w.conv1d = load.taps(prefix + "conv1d", config.conv_channels(), config.linear_conv_kernel_dim);
  w.a_log = load.vector(prefix + "A_log");
  w.dt_bias = load.vector(prefix + "dt_bias");
  w.norm = load.vector(prefix + "norm");
  return w;
}

AttentionWeights load_self_attn(Loader& load, const std::string& prefix) {
  AttentionWeights w;
  w.q_proj = load.matrix(prefix + "q_proj");
  w.k_proj = load.matrix(prefix + "k_proj");
  w.v_proj = load.matrix(prefix + "v_proj");
  w.o_proj = load.matrix(prefix + "o_proj");
  w.q_norm = load.vector(prefix + "q_norm");
  w.k_norm = load.vector(prefix + "k_norm");
  return w;
}

}  // namespace

Weights::Weights(Backend& backend, IoQueue& io, const std::vector<std::unique_ptr<File>>& files,
                 const CheckpointSpec& spec, const ModelConfig& config, const Progress& progress) {
  Loader load(backend, io, files, spec);
  embed_tokens = load.matrix("embed_tokens");
  lm_head = load.has_matrix("lm_head") ? load.matrix("lm_head") : embed_tokens;
  norm = load.vector("norm");
  for (int layer = 0; layer < config.layers(); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    LayerWeights w;
    w.input_layernorm = load.vector(prefix + "input_layernorm");
    w.post_attention_layernorm = load.vector(prefix + "post_attention_layernorm");
    if (config.attention_layers[layer]) {
      w.self_attn = load_self_attn(load, prefix + "self_attn.");
    } else {
      w.linear_attn = load_linear_attn(load, prefix + "linear_attn.", config);
    }
    w.router = load.matrix(prefix + "mlp.gate");
    w.shared_gate_proj = load.matrix(prefix + "mlp.shared_expert.gate_proj");
    w.shared_up_proj = load.matrix(prefix + "mlp.shared_expert.up_proj");
    w.shared_down_proj = load.matrix(prefix + "mlp.shared_expert.down_proj");
    w.shared_expert_gate = load.matrix(prefix + "mlp.shared_expert_gate");
    layers.push_back(w);
  }
  load.finish(progress);
  bytes = load.bytes();
  mapped = load.mapped();
  buffers_ = load.take_buffers();
}

}  // namespace flashmoe
