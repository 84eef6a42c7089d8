// Everything a sequence carries from token to token, as one value.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace flashmoe {

struct KeyValueCache {  // of an attention layer
  Buffer keys, values;  // [kv_heads, capacity, head_dim]
  int64_t capacity = 0;
};

// The caches of all layers. They only ever grow, so that a state and its forks share them, each as
// far as its own position.
struct KeyValues {
  std::vector<KeyValueCache> layers;  // empty ones for GatedDeltaNet layers
  int64_t length = 0;                 // positions that are written: the longest state's
  std::atomic<int64_t> bytes = 0;     // read by threads that do not have their turn
};

struct DeltaState {  // of a GatedDeltaNet layer
  Buffer conv;       // float [kernel - 1, channels]
  Buffer recurrent;  // float [value_heads, key_dim, value_dim]
};

// A tensor of a state: `blocks` runs of `block_bytes`, one after the other in the tensor and
// `stride` bytes apart in the state's own memory.
struct StateTensor {
  std::string name;  // such as layers.3.keys
  DType dtype;
  std::vector<int64_t> shape;
  std::byte* data;
  size_t blocks, block_bytes, stride;
};

class State {
 public:
  State(Backend& backend, const ModelConfig& config, DType cache_dtype);
  State(State&&) = default;
  State& operator=(State&&) = default;

  // A copy of the recurrent states that shares keys and values.
  State fork() const;
  // Makes room for `tokens` in every cache, behind what this state holds of them. Where another
  // state has written there, this one gets keys and values of its own. A cache at a time is copied.
  // Throws OutOfMemoryError; the state is then as it was.
  void reserve(int64_t tokens);

  int64_t position() const { return position_; }
  DType cache_dtype() const { return cache_dtype_; }
  int64_t bytes() const;  // shared keys and values too
  const KeyValues& key_values() const { return *key_values_; }
  // All tensors of a state of so many tokens; their memory is this one's where it is that long.
  std::vector<StateTensor> tensors(int64_t position) const;
  // Copies a tensor of this state to memory of the host, and from there.
  void read(const StateTensor& tensor, std::byte* to) const;
  void write(const StateTensor& tensor, const std::byte* from);
  // Bytes of one layer's buffers.
  size_t conv_bytes() const;
  size_t recurrent_bytes() const;
  size_t row_bytes() const;  // of one head's key at one position

  // By layer; only the one of the layer's kind is there.
  KeyValueCache& cache(int layer) const { return key_values_->layers[layer]; }
  std::vector<DeltaState> deltas;

  // `tokens` more have been taken in, for which there was room.
  void advance(int64_t tokens) { key_values_->length = position_ += tokens; }

 private:
  KeyValueCache copy(const KeyValueCache& old, int64_t length, int64_t capacity) const;

  std::shared_ptr<KeyValues> key_values_;
  Backend* backend_;
  const ModelConfig* config_;
  DType cache_dtype_;
  int64_t position_ = 0;
};

// The DeltaStates of all layers, none for attention layers.
std::vector<DeltaState> allocate_deltas(Backend& backend, const ModelConfig& config);

// What states take: bytes of the DeltaStates of all layers; of the keys and values of all layers,
// with room for `capacity` tokens; and the tokens that a cache has room for, when one of `capacity`
// has to hold so many.
int64_t delta_bytes(const ModelConfig& config);
int64_t key_value_bytes(const ModelConfig& config, DType cache_dtype, int64_t capacity);
int64_t grown_capacity(int64_t capacity, int64_t tokens);

}  // namespace flashmoe
