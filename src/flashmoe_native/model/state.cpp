#include "model/state.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "core/error.h"

namespace flashmoe {
namespace {

constexpr int64_t kCacheStep = 256;  // caches grow by half, in multiples of so many tokens

size_t conv_bytes_of(const ModelConfig& config) {
  return sizeof(float) * static_cast<size_t>(config.linear_conv_kernel_dim - 1) *
         config.conv_channels();
}

size_t recurrent_bytes_of(const ModelConfig& config) {
  return sizeof(float) * static_cast<size_t>(config.linear_num_value_heads) *
         config.linear_key_head_dim * config.linear_value_head_dim;
}

}  // namespace

std::vector<DeltaState> allocate_deltas(Backend& backend, const ModelConfig& config) {
  std::vector<DeltaState> result;
  for (const bool attention : config.attention_layers) {
    if (attention) {
      result.push_back({});
    } else {
      result.push_back({backend.allocate(Memory::kState, conv_bytes_of(config)),
                        backend.allocate(Memory::kState, recurrent_bytes_of(config))});
    }
  }
  return result;
}

State::State(Backend& backend, const ModelConfig& config, DType cache_dtype)
    : deltas(allocate_deltas(backend, config)),
      backend_(&backend),
      config_(&config),
      cache_dtype_(cache_dtype) {
  for (int layer = 0; layer < config.layers(); ++layer) caches.push_back({});
}

size_t State::conv_bytes() const {
  return conv_bytes_of(*config_);
}

size_t State::recurrent_bytes() const {
  return recurrent_bytes_of(*config_);
}

size_t State::row_bytes() const {
  return size_of(cache_dtype_) * static_cast<size_t>(config_->head_dim);
}

int64_t State::bytes() const {
  int64_t total = 0;
  for (int layer = 0; layer < config_->layers(); ++layer) {
    total += config_->attention_layers[layer]
                 ? static_cast<int64_t>(2 * row_bytes()) * config_->num_key_value_heads *
                       caches[layer].capacity
                 : static_cast<int64_t>(conv_bytes() + recurrent_bytes());
  }
  return total;
}

KeyValueCache State::grown(const KeyValueCache& old, int64_t capacity) const {
  const size_t row = row_bytes(), held = row * position_;
  const size_t bytes = row * config_->num_key_value_heads * capacity;
  KeyValueCache fresh{backend_->allocate(Memory::kState, bytes),
                      backend_->allocate(Memory::kState, bytes), capacity};
  for (int head = 0; held > 0 && head < config_->num_key_value_heads; ++head) {
    const size_t to = row * head * capacity, from = row * head * old.capacity;
    std::memcpy(fresh.keys.get() + to, old.keys.get() + from, held);
    std::memcpy(fresh.values.get() + to, old.values.get() + from, held);
  }
  return fresh;
}

std::vector<StateTensor> State::tensors(int64_t position) const {
  std::vector<StateTensor> result;
  for (int layer = 0; layer < config_->layers(); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    if (config_->attention_layers[layer]) {
      const KeyValueCache& cache = caches[layer];
      const auto add = [&](const char* name, const Buffer& buffer) {
        result.push_back({prefix + name,
                          cache_dtype_,
                          {config_->num_key_value_heads, position, config_->head_dim},
                          buffer.get(),
                          static_cast<size_t>(config_->num_key_value_heads),
                          row_bytes() * static_cast<size_t>(position),
                          row_bytes() * static_cast<size_t>(cache.capacity)});
      };
      add("keys", cache.keys);
      add("values", cache.values);
    } else {
      const auto add = [&](const char* name, std::vector<int64_t> shape, size_t bytes,
                           const Buffer& buffer) {
        result.push_back(
            {prefix + name, DType::F32, std::move(shape), buffer.get(), 1, bytes, bytes});
      };
      add("conv", {config_->linear_conv_kernel_dim - 1, config_->conv_channels()}, conv_bytes(),
          deltas[layer].conv);
      add("recurrent",
          {config_->linear_num_value_heads, config_->linear_key_head_dim,
           config_->linear_value_head_dim},
          recurrent_bytes(), deltas[layer].recurrent);
    }
  }
  return result;
}

void State::reserve(int64_t tokens) try {
  for (int layer = 0; layer < config_->layers(); ++layer) {
    if (!config_->attention_layers[layer] || tokens <= caches[layer].capacity) continue;
    const int64_t wanted = std::max(tokens, caches[layer].capacity + caches[layer].capacity / 2);
    caches[layer] = grown(caches[layer], (wanted + kCacheStep - 1) / kCacheStep * kCacheStep);
  }
} catch (const std::bad_alloc&) {
  throw OutOfMemoryError("the system does not grant the memory for keys and values of " +
                         std::to_string(tokens) + " tokens; the state still holds " +
                         std::to_string(position_) +
                         ": end other programs, give the experts a smaller cache, or a shorter "
                         "context");
}

State State::fork() const {
  State copy(*backend_, *config_, cache_dtype_);
  copy.position_ = position_;
  for (int layer = 0; layer < config_->layers(); ++layer) {
    if (config_->attention_layers[layer]) {
      if (caches[layer].capacity > 0) {
        copy.caches[layer] = grown(caches[layer], caches[layer].capacity);
      }
    } else {
      std::memcpy(copy.deltas[layer].conv.get(), deltas[layer].conv.get(), conv_bytes());
      std::memcpy(copy.deltas[layer].recurrent.get(), deltas[layer].recurrent.get(),
                  recurrent_bytes());
    }
  }
  return copy;
}

}  // namespace flashmoe
