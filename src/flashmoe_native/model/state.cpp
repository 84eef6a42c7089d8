#include "model/state.h"

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/round.h"

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

// Keys and values of an attention layer.
int64_t layer_bytes(const ModelConfig& config, DType cache_dtype, int64_t capacity) {
  return 2 * static_cast<int64_t>(size_of(cache_dtype)) * config.num_key_value_heads *
         config.head_dim * capacity;
}

int64_t attention_layers(const ModelConfig& config) {
  return std::count(config.attention_layers.begin(), config.attention_layers.end(), true);
}

}  // namespace

int64_t delta_bytes(const ModelConfig& config) {
  const int64_t layers = config.layers() - attention_layers(config);
  return layers * static_cast<int64_t>(conv_bytes_of(config) + recurrent_bytes_of(config));
}

int64_t key_value_bytes(const ModelConfig& config, DType cache_dtype, int64_t capacity) {
  return attention_layers(config) * layer_bytes(config, cache_dtype, capacity);
}

int64_t grown_capacity(int64_t capacity, int64_t tokens) {
  if (tokens <= capacity) return capacity;
  return round_up(std::max(tokens, capacity + capacity / 2), kCacheStep);
}

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
      key_values_(std::make_shared<KeyValues>()),
      backend_(&backend),
      config_(&config),
      cache_dtype_(cache_dtype) {
  key_values_->layers.resize(config.layers());
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
  return key_values_->bytes + delta_bytes(*config_);
}

KeyValueCache State::copy(const KeyValueCache& old, int64_t length, int64_t capacity) const {
  const size_t row = row_bytes(), held = row * length;
  const size_t bytes = row * config_->num_key_value_heads * capacity;
  KeyValueCache fresh{backend_->allocate(Memory::kState, bytes),
                      backend_->allocate(Memory::kState, bytes), capacity};
  for (int head = 0; held > 0 && head < config_->num_key_value_heads; ++head) {
    const size_t to = row * head * capacity, from = row * head * old.capacity;
    backend_->copy(fresh.keys.get() + to, old.keys.get() + from, held);
    backend_->copy(fresh.values.get() + to, old.values.get() + from, held);
  }
  return fresh;
}

std::vector<StateTensor> State::tensors(int64_t position) const {
  std::vector<StateTensor> result;
  for (int layer = 0; layer < config_->layers(); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    if (config_->attention_layers[layer]) {
      const KeyValueCache& cache = this->cache(layer);
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

void State::read(const StateTensor& tensor, std::byte* to) const {
  for (size_t i = 0; tensor.block_bytes > 0 && i < tensor.blocks; ++i) {
    backend_->copy(to + i * tensor.block_bytes, tensor.data + i * tensor.stride,
                   tensor.block_bytes);
  }
}

void State::write(const StateTensor& tensor, const std::byte* from) {
  for (size_t i = 0; tensor.block_bytes > 0 && i < tensor.blocks; ++i) {
    backend_->copy(tensor.data + i * tensor.stride, from + i * tensor.block_bytes,
                   tensor.block_bytes);
  }
}

void State::reserve(int64_t tokens) try {
  if (key_values_->length > position_) {  // another state has gone on, or had until it was freed
    if (key_values_.use_count() > 1) {
      auto own = std::make_shared<KeyValues>();
      for (const KeyValueCache& old : key_values_->layers) {
        own->layers.push_back(old.capacity > 0 ? copy(old, position_, grown_capacity(0, tokens))
                                               : KeyValueCache{});
      }
      key_values_ = std::move(own);
    }
    key_values_->length = position_;
  }
  for (int layer = 0; layer < config_->layers(); ++layer) {
    KeyValueCache& cache = key_values_->layers[layer];
    if (!config_->attention_layers[layer] || tokens <= cache.capacity) continue;
    cache = copy(cache, position_, grown_capacity(cache.capacity, tokens));
  }
  int64_t capacity = 0;  // of all layers
  for (const KeyValueCache& cache : key_values_->layers) capacity += cache.capacity;
  key_values_->bytes = layer_bytes(*config_, cache_dtype_, capacity);
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
  copy.key_values_ = key_values_;
  for (int layer = 0; layer < config_->layers(); ++layer) {
    if (config_->attention_layers[layer]) continue;
    backend_->copy(copy.deltas[layer].conv.get(), deltas[layer].conv.get(), conv_bytes());
    backend_->copy(copy.deltas[layer].recurrent.get(), deltas[layer].recurrent.get(),
                   recurrent_bytes());
  }
  return copy;
}

}  // namespace flashmoe
