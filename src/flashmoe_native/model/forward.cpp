#include "model/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/stopwatch.h"

namespace flashmoe {
namespace {

size_t size(int a, int b) {
  return static_cast<size_t>(a) * static_cast<size_t>(b);
}

}  // namespace

Forward::Forward(Backend& backend, const ModelConfig& config, const Weights& weights,
                 ExpertStore& store, int chunk)
    : backend_(backend),
      config_(config),
      weights_(weights),
      store_(store),
      chunk_(chunk),
      act_(config, chunk, [this](size_t bytes, Memory memory) { return take(bytes, memory); }),
      next_deltas_(allocate_deltas(backend, config)),
      first_(static_cast<size_t>(config.num_experts) + 1),
      layer_times_(static_cast<size_t>(config.layers())) {
  for (int i = 0; i < chunk; ++i) act_.every[i] = i;
}

void* Forward::take(size_t bytes, Memory memory) {
  buffers_.push_back(backend_.allocate(memory, bytes));
  bytes_ += static_cast<int64_t>(bytes);
  return buffers_.back().get();
}

void Forward::run(State& state, std::span<const int32_t> ids, const Output& out,
                  const std::function<void()>& check) {
  const int n = static_cast<int>(ids.size());
  state.reserve(state.position() + n);
  try {
    // With three choices to an expert, few of the first layer's experts are not chosen.
    if (n * config_.experts_per_token >= 3 * config_.num_experts) store_.read_ahead(0);
    backend_.embed(weights_.embed_tokens, ids, act_.x);
    norm(0, n, weights_.layers[0].input_layernorm);
    for (int layer = 0; layer < config_.layers(); ++layer) {
      check();
      run_layer(layer, n, state, check);
      if (out.routing) copy_routing(layer, n, out.routing);
    }
    backend_.all_finite(n, config_.hidden_size, act_.x, act_.finite);
    backend_.finish();
    check_finite(config_.layers(), n);
    store_.end_pass(n);
    Stopwatch watch;
    if (out.logits) head(n, out.all_logits, out.logits);
    head_seconds_ += watch.lap();
  } catch (...) {
    store_.cancel();
    backend_.finish();
    throw;
  }
  for (int layer = 0; layer < config_.layers(); ++layer) {
    std::swap(state.deltas[layer], next_deltas_[layer]);
  }
  state.advance(n);
}

// normed is rms_norm(x) already, and in the end that of the next layer.
void Forward::run_layer(int layer, int n, State& state, const std::function<void()>& check) {
  LayerTimes& times = layer_times_[layer];
  Stopwatch watch;
  if (config_.attention_layers[layer]) {
    full_attention(layer, n, state);
  } else {
    linear_attention(layer, n, state);
  }
  times.mixer += watch.lap();
  norm(0, n, weights_.layers[layer].post_attention_layernorm);
  times.router += watch.lap();
  mixture_of_experts(layer, n, check);
  watch = {};
  const bool last = layer + 1 == config_.layers();
  backend_.combine(n, {.hidden = config_.hidden_size,
                       .experts_per_token = config_.experts_per_token,
                       .expert_out = act_.expert_out,
                       .expert_weights = act_.expert_weights,
                       .shared_out = act_.shared_out,
                       .shared_gate = act_.shared_gate,
                       .x = act_.x,
                       .norm_weight = last ? nullptr : weights_.layers[layer + 1].input_layernorm,
                       .norm_eps = config_.rms_norm_eps,
                       .normed = act_.normed});
  times.combine += watch.lap();
}

void Forward::linear_attention(int layer, int n, const State& state) {
  const DeltaWeights& w = weights_.layers[layer].linear_attn;
  const auto floats_of = [](const Buffer& buffer) {
    return reinterpret_cast<float*>(buffer.get());
  };
  const Product inputs[] = {{&w.in_proj_qkv, act_.qkv},
                            {&w.in_proj_z, act_.z},
                            {&w.in_proj_b, act_.b},
                            {&w.in_proj_a, act_.a}};
  backend_.matmul(n, act_.normed, inputs);
  backend_.causal_conv(n, {.channels = config_.conv_channels(),
                           .kernel = config_.linear_conv_kernel_dim,
                           .weight = w.conv1d,
                           .state_in = floats_of(state.deltas[layer].conv),
                           .state_out = floats_of(next_deltas_[layer].conv),
                           .x = act_.qkv});
  backend_.gated_delta(n, {.key_heads = config_.linear_num_key_heads,
                           .value_heads = config_.linear_num_value_heads,
                           .key_dim = config_.linear_key_head_dim,
                           .value_dim = config_.linear_value_head_dim,
                           .norm_eps = config_.rms_norm_eps,
                           .a_log = w.a_log,
                           .dt_bias = w.dt_bias,
                           .norm = w.norm,
                           .qkv = act_.qkv,
                           .z = act_.z,
                           .a = act_.a,
                           .b = act_.b,
                           .state_in = floats_of(state.deltas[layer].recurrent),
                           .state_out = floats_of(next_deltas_[layer].recurrent),
                           .out = act_.mixed});
  const Product output[] = {{&w.out_proj, act_.x, true}};
  backend_.matmul(n, act_.mixed, output);
}

void Forward::full_attention(int layer, int n, State& state) {
  const AttentionWeights& w = weights_.layers[layer].self_attn;
  const KeyValueCache& cache = state.cache(layer);
  const Product inputs[] = {
      {&w.q_proj, act_.query}, {&w.k_proj, act_.key}, {&w.v_proj, act_.value}};
  backend_.matmul(n, act_.normed, inputs);
  backend_.attention(n, {.heads = config_.num_attention_heads,
                         .kv_heads = config_.num_key_value_heads,
                         .head_dim = config_.head_dim,
                         .rotary_dim = config_.rotary_dim,
                         .rope_theta = config_.rope_theta,
                         .norm_eps = config_.rms_norm_eps,
                         .q_norm = w.q_norm,
                         .k_norm = w.k_norm,
                         .q_gate = act_.query,
                         .k = act_.key,
                         .v = act_.value,
                         .position = state.position(),
                         .capacity = cache.capacity,
                         .cache_dtype = state.cache_dtype(),
                         .keys = cache.keys.get(),
                         .values = cache.values.get(),
                         .out = act_.mixed});
  const Product output[] = {{&w.o_proj, act_.x, true}};
  backend_.matmul(n, act_.mixed, output);
}

void Forward::mixture_of_experts(int layer, int n, const std::function<void()>& check) {
  const LayerWeights& w = weights_.layers[layer];
  Stopwatch watch;
  const Product inputs[] = {{&w.router, act_.router_logits},
                            {&w.shared_expert_gate, act_.shared_gate}};
  backend_.matmul(n, act_.normed, inputs);
  backend_.route(n, {.experts = config_.num_experts,
                     .experts_per_token = config_.experts_per_token,
                     .renormalise = config_.norm_topk_prob,
                     .logits = act_.router_logits,
                     .hidden = config_.hidden_size,
                     .x = act_.x,
                     .ids = act_.ids,
                     .weights = act_.expert_weights,
                     .finite = act_.finite});
  backend_.finish();
  check_finite(layer, n);
  layer_times_[layer].router += watch.lap();
  group_by_expert(n);
  run_experts(layer, n, check);
}

// Experts that are in a slot already are computed together with the shared expert, the others as
// they land.
void Forward::run_experts(int layer, int n, const std::function<void()>& check) {
  const LayerWeights& w = weights_.layers[layer];
  LayerTimes& times = layer_times_[layer];
  Stopwatch watch;
  // A chunk that needs nearly all experts of this layer will need those of the next.
  const bool nearly_all = needed_.size() * 10 >= static_cast<size_t>(config_.num_experts) * 9;
  store_.start(layer, needed_, uses_, nearly_all && layer + 1 < config_.layers());
  const std::span<const int32_t> every(act_.every, static_cast<size_t>(n));
  calls_.assign(1, {.gate = w.shared_gate_proj,
                    .up = w.shared_up_proj,
                    .down = w.shared_down_proj,
                    .tokens = every,
                    .out_rows = every,
                    .out = act_.shared_out});
  const auto finish = [&] {
    backend_.finish();
    times.experts += watch.lap();
  };
  std::span<const ExpertStore::Arrived> landed = store_.ready();
  do {
    for (const ExpertStore::Arrived& expert : landed) calls_.push_back(call_of(expert));
    backend_.experts(n, act_.normed, calls_);
    times.experts += watch.lap();
    landed = store_.next(finish, check);
    times.wait += watch.lap();
    calls_.clear();
  } while (!landed.empty());
}

void Forward::norm(int row, int n, const float* weight) {
  backend_.rms_norm(n, config_.hidden_size, act_.x + size(row, config_.hidden_size), weight,
                    config_.rms_norm_eps, act_.normed);
}

void Forward::group_by_expert(int n) {
  const int pairs = n * config_.experts_per_token;
  std::fill(first_.begin(), first_.end(), 0);
  for (int pair = 0; pair < pairs; ++pair) ++first_[static_cast<size_t>(act_.ids[pair]) + 1];
  needed_.clear();
  uses_.clear();
  for (int expert = 0; expert < config_.num_experts; ++expert) {
    if (first_[expert + 1] > 0) {
      needed_.push_back(expert);
      uses_.push_back(first_[expert + 1]);
    }
    first_[expert + 1] += first_[expert];
  }
  // Filling moves first_[e] to its end, which is where e + 1 begins; shift back afterwards.
  for (int pair = 0; pair < pairs; ++pair) {
    const int32_t at = first_[act_.ids[pair]]++;
    act_.pair_token[at] = pair / config_.experts_per_token;
    act_.pair_row[at] = pair;
  }
  std::move_backward(first_.begin(), first_.end() - 1, first_.end());
  first_[0] = 0;
}

void Forward::copy_routing(int layer, int n, int32_t* routing) const {
  for (int token = 0; token < n; ++token) {
    std::copy_n(act_.ids + size(token, config_.experts_per_token), config_.experts_per_token,
                routing + (size(token, config_.layers()) + layer) * config_.experts_per_token);
  }
}

ExpertCall Forward::call_of(const ExpertStore::Arrived& expert) const {
  const int32_t begin = first_[expert.expert];
  const auto count = static_cast<size_t>(first_[expert.expert + 1] - begin);
  return {.gate = expert.gate,
          .up = expert.up,
          .down = expert.down,
          .tokens = {act_.pair_token + begin, count},
          .out_rows = {act_.pair_row + begin, count},
          .out = act_.expert_out};
}

// Weights that every token needs were checked when they were loaded, those of experts are not: what
// they do to the residual stream is seen here, before anything is made of it.
void Forward::check_finite(int layer, int n) const {
  const auto end = act_.finite + n;
  if (std::find(act_.finite, end, 0) == end) return;
  std::string where = "activations are not finite at layer " + std::to_string(layer);
  if (layer > 0) {
    const std::string bad = store_.find_not_finite(layer - 1, needed_);
    if (!bad.empty()) throw CheckpointError(bad);
  }
  throw CheckpointError(where + "; no weight is infinite or NaN, so the model's values overflow");
}

void Forward::head(int n, bool all_logits, float* logits) {
  const int begin = all_logits ? 0 : n - 1;
  for (int row = begin; row < n; row += kHeadRows) {
    const int rows = std::min(kHeadRows, n - row);
    norm(row, rows, weights_.norm);
    const Product product[] = {{&weights_.lm_head, act_.logits}};
    backend_.matmul(rows, act_.normed, product);
    backend_.finish();
    std::memcpy(logits + size(row - begin, config_.vocab_size), act_.logits,
                size(rows, config_.vocab_size) * sizeof(float));
  }
}

}  // namespace flashmoe
