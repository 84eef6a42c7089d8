// The forward pass of the Qwen3.5-MoE family, written once for every backend.
// Formulas: transformers' modeling_qwen3_5_moe.py; see docs/architecture.md.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "experts/expert_store.h"
#include "model/config.h"
#include "model/state.h"
#include "model/weights.h"

namespace flashmoe {

// Where the time of a layer went, in seconds, as the host saw it: with a backend that works beside
// the host, an operation's time is counted where the host waits for it.
struct LayerTimes {
  double mixer = 0;    // norm, GatedDeltaNet or attention
  double router = 0;   // norm, router, choice of experts
  double wait = 0;     // for experts from disk
  double experts = 0;  // the shared one too
  double combine = 0;
};

// What a forward pass of n tokens gives; null asks for nothing.
struct Output {
  float* logits = nullptr;  // [vocab] of the last token, or [n, vocab] if `all_logits`
  bool all_logits = false;
  // [n, layers, experts_per_token]: each token's experts, the likeliest first.
  int32_t* routing = nullptr;
};

class Forward {
 public:
  // Tokens go through in chunks of at most `chunk`, which bounds the memory for activations; a
  // chunk is routed at once, and each expert that it needs is read once.
  Forward(Backend& backend, const ModelConfig& config, const Weights& weights, ExpertStore& store,
          int chunk);

  // Takes `ids` in, at most `chunk` of them. `out` says what is wanted. `check` is called at least
  // once a layer and may throw; after any exception `state` is as it was. Throws ReadError,
  // CheckpointError.
  void run(State& state, std::span<const int32_t> ids, const Output& out,
           const std::function<void()>& check);

  int chunk() const { return chunk_; }
  int64_t bytes() const { return bytes_; }
  // Summed over all runs.
  const std::vector<LayerTimes>& layer_times() const { return layer_times_; }
  double head_seconds() const { return head_seconds_; }

 private:
  float* floats(size_t count);
  void linear_attention(int layer, int n, const State& state);
  void full_attention(int layer, int n, State& state);
  void mixture_of_experts(int layer, int n, int32_t* routing, const std::function<void()>& check);
  void group_by_expert(int n);
  void copy_routing(int layer, int n, int32_t* routing) const;
  ExpertCall call_of(const ExpertStore::Arrived& expert) const;
  void check_finite(int layer, int n) const;
  void head(int n, bool all_logits, float* logits);

  Backend& backend_;
  const ModelConfig& config_;
  const Weights& weights_;
  ExpertStore& store_;
  const int chunk_;
  int64_t bytes_ = 0;
  std::vector<Backend::Buffer> buffers_;

  // The recurrent states that a run writes; they change places with the State's when it succeeds.
  std::vector<DeltaState> next_deltas_;

  // Activations, a row a token.
  float* x_;       // [chunk, hidden] the residual stream
  float* normed_;  // [chunk, hidden]
  float* wide_;    // qkv of a GatedDeltaNet layer, or query and gate of an attention layer
  float* z_;       // gate of a GatedDeltaNet layer, or keys of an attention layer
  float* values_;  // values of an attention layer
  float* a_;       // [chunk, value_heads]
  float* b_;       // [chunk, value_heads]
  float* mixed_;   // what the mixer gives before its output projection

  float* router_logits_;   // [chunk, experts]
  int32_t* ids_;           // [chunk, experts_per_token]: experts of each token
  float* expert_weights_;  // [chunk, experts_per_token]
  float* expert_out_;      // [chunk * experts_per_token, hidden]
  float* shared_out_;      // [chunk, hidden]
  float* shared_gate_;     // [chunk]
  float* logits_;          // [kHeadRows, vocab]

  // The chunk's (token, choice) pairs sorted by expert: those of expert e at first_[e] .. first_[e
  // + 1].
  std::vector<int32_t> first_;
  int32_t* tokens_;              // token of each pair
  int32_t* rows_;                // its row of expert_out_
  int32_t* every_;               // 0, 1, ..., chunk - 1
  std::vector<int32_t> needed_;  // experts of the layer, and how many tokens need each
  std::vector<int32_t> uses_;
  std::vector<ExpertCall> calls_;

  std::vector<LayerTimes> layer_times_;
  double head_seconds_ = 0;
};

}  // namespace flashmoe
