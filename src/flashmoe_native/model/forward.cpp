#include "model/forward.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"

namespace flashmoe {
namespace {

constexpr int kHeadRows = 16;  // rows of logits computed at a time

// Adds the time since it was made, or since the last call, to one sum after another.
class Stopwatch {
 public:
  void lap(double& seconds) {
    const auto now = std::chrono::steady_clock::now();
    seconds += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

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
      next_deltas_(allocate_deltas(backend, config)),
      first_(static_cast<size_t>(config.num_experts) + 1),
      layer_times_(static_cast<size_t>(config.layers())) {
  const int key_values = config.num_key_value_heads * config.head_dim;
  x_ = floats(size(chunk, config.hidden_size));
  normed_ = floats(size(chunk, config.hidden_size));
  wide_ = floats(size(
      chunk, std::max(config.conv_channels(), 2 * config.num_attention_heads * config.head_dim)));
  z_ = floats(size(chunk, std::max(config.value_width(), key_values)));
  values_ = floats(size(chunk, key_values));
  a_ = floats(size(chunk, config.linear_num_value_heads));
  b_ = floats(size(chunk, config.linear_num_value_heads));
  mixed_ = floats(
      size(chunk, std::max(config.value_width(), config.num_attention_heads * config.head_dim)));
  router_logits_ = floats(size(chunk, config.num_experts));
  expert_weights_ = floats(size(chunk, config.experts_per_token));
  expert_out_ = floats(size(chunk, config.experts_per_token) * config.hidden_size);
  shared_out_ = floats(size(chunk, config.hidden_size));
  shared_gate_ = floats(static_cast<size_t>(chunk));
  logits_ = floats(size(std::min(kHeadRows, chunk), config.vocab_size));
  static_assert(sizeof(int32_t) == sizeof(float));
  ids_ = reinterpret_cast<int32_t*>(floats(size(chunk, config.experts_per_token)));
  tokens_ = reinterpret_cast<int32_t*>(floats(size(chunk, config.experts_per_token)));
  rows_ = reinterpret_cast<int32_t*>(floats(size(chunk, config.experts_per_token)));
  every_ = reinterpret_cast<int32_t*>(floats(static_cast<size_t>(chunk)));
  for (int i = 0; i < chunk; ++i) every_[i] = i;
}

float* Forward::floats(size_t count) {
  buffers_.push_back(backend_.allocate(count * sizeof(float)));
  bytes_ += static_cast<int64_t>(count * sizeof(float));
  return reinterpret_cast<float*>(buffers_.back().get());
}

void Forward::run(State& state, std::span<const int32_t> ids, const Output& out,
                  const std::function<void()>& check) {
  const int n = static_cast<int>(ids.size());
  state.reserve(state.position() + n);
  try {
    // With three choices to an expert, few of the first layer's experts are not chosen.
    if (n * config_.experts_per_token >= 3 * config_.num_experts) store_.read_ahead(0);
    backend_.embed(weights_.embed_tokens, ids, x_);
    backend_.rms_norm(n, config_.hidden_size, x_, weights_.layers[0].input_layernorm,
                      config_.rms_norm_eps, normed_);
    for (int layer = 0; layer < config_.layers(); ++layer) {
      check();
      Stopwatch watch;
      if (config_.attention_layers[layer]) {
        full_attention(layer, n, state);
      } else {
        linear_attention(layer, n, state);
      }
      watch.lap(layer_times_[layer].mixer);
      mixture_of_experts(layer, n, out.routing, check);
    }
    backend_.finish();
    check_finite(config_.layers(), n);
    store_.release();
    store_.age(n);
    Stopwatch watch;
    if (out.logits) head(n, out.all_logits, out.logits);
    watch.lap(head_seconds_);
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

void Forward::linear_attention(int layer, int n, const State& state) {
  const DeltaWeights& w = weights_.layers[layer].linear_attn;
  const auto floats_of = [](const Backend::Buffer& buffer) {
    return reinterpret_cast<float*>(buffer.get());
  };
  const Product inputs[] = {
      {&w.in_proj_qkv, wide_}, {&w.in_proj_z, z_}, {&w.in_proj_b, b_}, {&w.in_proj_a, a_}};
  backend_.matmul(n, normed_, inputs);
  backend_.causal_conv(n, {.channels = config_.conv_channels(),
                           .kernel = config_.linear_conv_kernel_dim,
                           .weight = w.conv1d,
                           .state_in = floats_of(state.deltas[layer].conv),
                           .state_out = floats_of(next_deltas_[layer].conv),
                           .x = wide_});
  backend_.gated_delta(n, {.key_heads = config_.linear_num_key_heads,
                           .value_heads = config_.linear_num_value_heads,
                           .key_dim = config_.linear_key_head_dim,
                           .value_dim = config_.linear_value_head_dim,
                           .norm_eps = config_.rms_norm_eps,
                           .a_log = w.a_log,
                           .dt_bias = w.dt_bias,
                           .norm = w.norm,
                           .qkv = wide_,
                           .z = z_,
                           .a = a_,
                           .b = b_,
                           .state_in = floats_of(state.deltas[layer].recurrent),
                           .state_out = floats_of(next_deltas_[layer].recurrent),
                           .out = mixed_});
  const Product output[] = {{&w.out_proj, x_, true}};
  backend_.matmul(n, mixed_, output);
}

void Forward::full_attention(int layer, int n, State& state) {
  const AttentionWeights& w = weights_.layers[layer].self_attn;
  const KeyValueCache& cache = state.cache(layer);
  float* keys = z_;
  const Product inputs[] = {{&w.q_proj, wide_}, {&w.k_proj, keys}, {&w.v_proj, values_}};
  backend_.matmul(n, normed_, inputs);
  backend_.attention(n, {.heads = config_.num_attention_heads,
                         .kv_heads = config_.num_key_value_heads,
                         .head_dim = config_.head_dim,
                         .rotary_dim = config_.rotary_dim,
                         .rope_theta = config_.rope_theta,
                         .norm_eps = config_.rms_norm_eps,
                         .q_norm = w.q_norm,
                         .k_norm = w.k_norm,
                         .q_gate = wide_,
                         .k = keys,
                         .v = values_,
                         .position = state.position(),
                         .capacity = cache.capacity,
                         .cache_dtype = state.cache_dtype(),
                         .keys = cache.keys.get(),
                         .values = cache.values.get(),
                         .out = mixed_});
  const Product output[] = {{&w.o_proj, x_, true}};
  backend_.matmul(n, mixed_, output);
}

void Forward::mixture_of_experts(int layer, int n, int32_t* routing,
                                 const std::function<void()>& check) {
  const LayerWeights& w = weights_.layers[layer];
  LayerTimes& times = layer_times_[layer];
  Stopwatch watch;
  backend_.rms_norm(n, config_.hidden_size, x_, w.post_attention_layernorm, config_.rms_norm_eps,
                    normed_);
  const Product inputs[] = {{&w.router, router_logits_}, {&w.shared_expert_gate, shared_gate_}};
  backend_.matmul(n, normed_, inputs);
  backend_.route(n, config_.num_experts, config_.experts_per_token, config_.norm_topk_prob,
                 router_logits_, ids_, expert_weights_);
  backend_.finish();
  check_finite(layer, n);
  if (routing) copy_routing(layer, n, routing);
  watch.lap(times.router);
  group_by_expert(n);
  store_.release();
  store_.start(layer, needed_, uses_);

  const std::span<const int32_t> every(every_, static_cast<size_t>(n));
  calls_.assign(1, {.gate = w.shared_gate_proj,
                    .up = w.shared_up_proj,
                    .down = w.shared_down_proj,
                    .tokens = every,
                    .out_rows = every,
                    .out = shared_out_});
  const bool last = layer + 1 == config_.layers();
  // A chunk that needs nearly all experts of this layer will need those of the next.
  bool go_ahead = !last && needed_.size() * 10 >= static_cast<size_t>(config_.num_experts) * 9;
  // Experts that are in a slot already are computed together with the shared expert.
  auto arrived = store_.ready();
  while (true) {
    if (go_ahead && !store_.starved()) {
      store_.read_ahead(layer + 1);
      go_ahead = false;
    }
    for (const ExpertStore::Arrived& expert : arrived) calls_.push_back(call_of(expert));
    backend_.experts(n, normed_, calls_);
    if (store_.starved()) {
      backend_.finish();
      store_.release();
    }
    watch.lap(times.experts);
    arrived = store_.next(check);
    watch.lap(times.wait);
    if (arrived.empty()) break;
    calls_.clear();
  }
  backend_.combine(n, {.hidden = config_.hidden_size,
                       .experts_per_token = config_.experts_per_token,
                       .expert_out = expert_out_,
                       .expert_weights = expert_weights_,
                       .shared_out = shared_out_,
                       .shared_gate = shared_gate_,
                       .x = x_,
                       .norm_weight = last ? nullptr : weights_.layers[layer + 1].input_layernorm,
                       .norm_eps = config_.rms_norm_eps,
                       .normed = normed_});
  watch.lap(times.combine);
}

void Forward::group_by_expert(int n) {
  const int pairs = n * config_.experts_per_token;
  std::fill(first_.begin(), first_.end(), 0);
  for (int pair = 0; pair < pairs; ++pair) ++first_[static_cast<size_t>(ids_[pair]) + 1];
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
    const int32_t at = first_[ids_[pair]]++;
    tokens_[at] = pair / config_.experts_per_token;
    rows_[at] = pair;
  }
  std::move_backward(first_.begin(), first_.end() - 1, first_.end());
  first_[0] = 0;
}

void Forward::copy_routing(int layer, int n, int32_t* routing) const {
  for (int token = 0; token < n; ++token) {
    std::copy_n(ids_ + size(token, config_.experts_per_token), config_.experts_per_token,
                routing + (size(token, config_.layers()) + layer) * config_.experts_per_token);
  }
}

ExpertCall Forward::call_of(const ExpertStore::Arrived& expert) const {
  const int32_t begin = first_[expert.expert];
  const auto count = static_cast<size_t>(first_[expert.expert + 1] - begin);
  return {.gate = expert.gate,
          .up = expert.up,
          .down = expert.down,
          .tokens = {tokens_ + begin, count},
          .out_rows = {rows_ + begin, count},
          .out = expert_out_};
}

// Weights that every token needs were checked when they were loaded, those of experts are not: what
// they do to the residual stream is seen here, before anything is made of it.
void Forward::check_finite(int layer, int n) const {
  bool finite = true;
  for (size_t i = 0; i < size(n, config_.hidden_size); ++i) finite &= std::isfinite(x_[i]);
  for (size_t i = 0; i < size(n, config_.num_experts); ++i) {
    finite &= std::isfinite(router_logits_[i]);
  }
  if (finite) return;
  std::string where = "activations are not finite at layer " + std::to_string(layer);
  if (layer > 0) {
    const std::string bad = store_.find_not_finite(layer - 1, needed_);
    if (!bad.empty()) throw CheckpointError(bad);
  }
  throw CheckpointError(where + "; no weight is infinite or NaN, so the model's values overflow");
}

void Forward::head(int n, bool all_logits, float* logits) {
  const int begin = all_logits ? 0 : n - 1;
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  for (int row = begin; row < n; row += kHeadRows) {
    const int rows = std::min(kHeadRows, n - row);
    backend_.rms_norm(rows, config_.hidden_size, x_ + row * hidden, weights_.norm,
                      config_.rms_norm_eps, normed_);
    const Product product[] = {{&weights_.lm_head, logits_}};
    backend_.matmul(rows, normed_, product);
    backend_.finish();
    std::memcpy(logits + size(row - begin, config_.vocab_size), logits_,
                size(rows, config_.vocab_size) * sizeof(float));
  }
}

}  // namespace flashmoe
