// The arrays that a forward pass computes in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "backend/backend.h"
#include "model/config.h"

namespace flashmoe {

constexpr int kHeadRows = 16;  // rows of logits computed at a time

// A row a token, for at most `chunk` tokens. GatedDeltaNet and attention take turns with the
// arrays of a mixer.
struct Activations {
  // take(bytes, what for) gives room for one array after another, or, where the sizes are all that
  // is wanted, adds them up and gives null.
  using Take = std::function<void*(size_t, Memory)>;
  Activations(const ModelConfig& config, int chunk, const Take& take);

  float* x;       // [chunk, hidden_size]: the residual stream
  float* normed;  // [chunk, hidden_size]

  float* qkv;    // [chunk, conv_channels], or
  float* query;  // [chunk, num_attention_heads, 2 * head_dim], each with its output's gate
  float* z;      // [chunk, value_width], or
  float* key;    // [chunk, num_key_value_heads, head_dim]
  float* value;  // likewise
  float* a;      // [chunk, linear_num_value_heads]
  float* b;      // likewise
  float* mixed;  // what a mixer gives before its output projection

  float* router_logits;   // [chunk, num_experts]
  int32_t* ids;           // [chunk, experts_per_token]: the experts of each token
  int32_t* finite;        // [chunk]: 0 where something is infinite or NaN
  float* expert_weights;  // [chunk, experts_per_token]
  float* expert_out;      // [chunk, experts_per_token, hidden_size]
  float* shared_out;      // [chunk, hidden_size]
  float* shared_gate;     // [chunk], before its sigmoid

  // The chunk's (token, choice) pairs, sorted by expert.
  int32_t* pair_token;  // [chunk * experts_per_token]
  int32_t* pair_row;    // likewise: its row of expert_out
  int32_t* every;       // 0, 1, ..., chunk - 1

  float* logits;  // [kHeadRows, vocab_size]
};

}  // namespace flashmoe
