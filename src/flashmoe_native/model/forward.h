// The forward pass of the Qwen3.5-MoE family, written once for every backend.
// Formulas: transformers' modeling_qwen3_5_moe.py; see docs/architecture.md.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "experts/expert_store.h"
#include "model/activations.h"
#include "model/config.h"
#include "model/state.h"
#include "model/weights.h"

namespace flashmoe {

// Where the time of a layer went, in seconds, as the host saw it: with a backend that works beside
// the host, an operation's time is counted where the host waits for it.
struct LayerTimes {
  double mixer = 0;    // GatedDeltaNet or attention
  double router = 0;   // norm, router, choice of experts
  double wait = 0;     // for experts from disk
  double experts = 0;  // the shared one too
  double combine = 0;  // their sum, and the norm that the next layer begins with
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
  void* take(size_t bytes, Memory memory);
  void run_layer(int layer, int n, State& state, const std::function<void()>& check);
  // x += mixer(normed).
  void linear_attention(int layer, int n, const State& state);
  void full_attention(int layer, int n, State& state);
  // What combine() adds to x: expert_out, expert_weights, shared_out, shared_gate of normed.
  void mixture_of_experts(int layer, int n, const std::function<void()>& check);
  void run_experts(int layer, int n, const std::function<void()>& check);
  // normed = rms_norm(x), n rows from `row` on.
  void norm(int row, int n, const float* weight);
  void group_by_expert(int n);
  ExpertCall call_of(const ExpertStore::Arrived& expert) const;
  void copy_routing(int layer, int n, int32_t* routing) const;
  void check_finite(int layer, int n) const;
  void head(int n, bool all_logits, float* logits);

  Backend& backend_;
  const ModelConfig& config_;
  const Weights& weights_;
  ExpertStore& store_;
  const int chunk_;
  int64_t bytes_ = 0;
  std::vector<Buffer> buffers_;
  const Activations act_;

  // The recurrent states that a run writes; they change places with the State's when it succeeds.
  std::vector<DeltaState> next_deltas_;

  // Of the chunk's pairs, which are sorted by expert, those of expert e are first_[e] to
  // first_[e + 1].
  std::vector<int32_t> first_;
  std::vector<int32_t> needed_;  // experts of the layer, and how many tokens need each
  std::vector<int32_t> uses_;
  std::vector<ExpertCall> calls_;

  std::vector<LayerTimes> layer_times_;
  double head_seconds_ = 0;
};

}  // namespace flashmoe
