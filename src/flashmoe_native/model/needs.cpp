#include "model/needs.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/cpu/scratch.h"
#include "core/error.h"
#include "core/file.h"
#include "experts/slots.h"
#include "model/activations.h"
#include "model/placement.h"
#include "model/state.h"
#include "model/weights.h"

namespace flashmoe {
namespace {

Matrix without_data(const Format& format) {
  return make_matrix(format, {nullptr, nullptr, nullptr});
}

// Gives weights without data: what becomes of them is their place.
class WeightsToCome final : public WeightSource {
 public:
  WeightsToCome(const CheckpointSpec& spec, const WeightRules& rules)
      : WeightSource(spec), placement(spec, rules) {}

  Matrix matrix(const std::string& name) override {
    const auto& [format, extents] = find_matrix(name);
    for (int part = 0; part < format.parts(); ++part) {
      placement.put(format.part_bytes(part), extents[part]);
    }
    return without_data(format);
  }
  const float* vector(const std::string& name) override {
    placement.put(find_vector(name).length * static_cast<int64_t>(sizeof(float)));
    return nullptr;
  }
  const float* taps(const std::string& name, int, int) override { return vector(name); }

  Placement placement;
};

// Whether experts will be read past the page cache; they will be if the files are not here yet.
bool can_read_direct(const CheckpointSpec& spec) {
  std::vector<std::unique_ptr<File>> files;
  try {
    for (const std::string& path : spec.files) files.push_back(std::make_unique<File>(path));
  } catch (const ReadError&) {
    return true;
  }
  return can_read_direct(files, spec.experts);
}

int64_t state_capacity(int64_t context, int chunk) {
  int64_t capacity = 0;
  for (int64_t tokens = 0; tokens < context;) {
    tokens = std::min(tokens + chunk, context);
    capacity = grown_capacity(capacity, tokens);
  }
  return capacity;
}

// A pass whose experts have all landed at once; `pairs` has experts_per_token for each token.
PassShape pass_shape(const ModelConfig& config, const CheckpointSpec& spec, const Weights& weights,
                     int64_t position, std::span<const int32_t> pairs) {
  PassShape pass;
  const int n = static_cast<int>(pairs.size()) / config.experts_per_token;
  pass.tokens = n;
  pass.products = {{std::min(n, kHeadRows), weights.lm_head}};
  for (int layer = 0; layer < config.layers(); ++layer) {
    const LayerWeights& w = weights.layers[layer];
    const DeltaWeights& d = w.linear_attn;
    const AttentionWeights& a = w.self_attn;
    for (const Matrix& matrix :
         {d.in_proj_qkv, d.in_proj_z, d.in_proj_b, d.in_proj_a, d.out_proj, a.q_proj, a.k_proj,
          a.v_proj, a.o_proj, w.router, w.shared_expert_gate}) {
      pass.products.push_back({n, matrix});
    }
    const auto call = [](const Matrix& gate, const Matrix& up, const Matrix& down, auto tokens) {
      return ExpertCall{gate, up, down, tokens, tokens, nullptr};
    };
    const ExpertsSpec& routed = spec.experts[layer];
    pass.experts.push_back({call(w.shared_gate_proj, w.shared_up_proj, w.shared_down_proj,
                                 pairs.first(static_cast<size_t>(n))),
                            call(without_data(routed.gate), without_data(routed.up),
                                 without_data(routed.down), pairs)});
    if (config.attention_layers[layer]) {
      pass.attention.emplace();
      pass.attention->heads = config.num_attention_heads;
      pass.attention->kv_heads = config.num_key_value_heads;
      pass.attention->head_dim = config.head_dim;
      pass.attention->position = position;
    } else {
      pass.delta.emplace();
      pass.delta->key_dim = config.linear_key_head_dim;
      pass.delta->value_dim = config.linear_value_head_dim;
    }
  }
  return pass;
}

}  // namespace

Needs needs_of(const ModelConfig& config, const CheckpointSpec& spec, const Setting& setting,
               int64_t context) {
  Needs needs;
  WeightsToCome source(spec, setting.weight_rules());
  const Weights weights = get_weights(source, config);
  needs.resident = source.placement.bytes();
  needs.mapped = source.placement.mapped_bytes();

  SlotOptions slots = setting.slot_options(config.experts_per_token);
  const bool direct = can_read_direct(spec);
  slots.direct = slots.direct && direct;
  needs.slots = slots_for(spec.experts, slots).bytes();
  slots.cache_bytes = std::numeric_limits<int64_t>::max();
  slots.direct = direct;
  const Slots all = slots_for(spec.experts, slots);
  needs.slot = all.stride;
  needs.all_slots = all.bytes();

  const Activations activations(config, setting.chunk, [&](size_t bytes, Memory) {
    needs.activations += static_cast<int64_t>(bytes);
    return nullptr;
  });

  needs.recurrent = delta_bytes(config);
  needs.token = key_value_bytes(config, setting.cache_dtype(), 1);
  needs.state = needs.recurrent + key_value_bytes(config, setting.cache_dtype(),
                                                  state_capacity(context, setting.chunk));

  if (setting.backend == "cpu") {
    const std::vector<int32_t> pairs(static_cast<size_t>(setting.chunk) * config.experts_per_token);
    const int64_t position = std::max<int64_t>(0, context - setting.chunk);
    needs.scratch = cpu_scratch_bytes(pass_shape(config, spec, weights, position, pairs),
                                      parse_precision(setting.precision), setting.threads);
  }
  return needs;
}

}  // namespace flashmoe
