// How a model is run, as its user chose, and what follows from that before there is a device.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "backend/backend.h"
#include "experts/slots.h"

namespace flashmoe {

struct Setting {
  std::string backend = "cpu";
  std::string precision = "int8";  // or "float32"
  int threads = 1;
  int64_t cache_bytes = 0;  // for experts, in slots; 0 leaves caching to the page cache
  int chunk = 256;          // tokens of a prompt that are computed together, at most
  std::string kernels;      // where the sources of a GPU's kernels are
  bool overlap = false;     // a GPU computes experts beside the reads of others
  std::function<bool(int64_t bytes)> may_grow = {};  // see ExpertStore

  // Throw std::invalid_argument for a backend or precision that there is not.
  WeightRules weight_rules() const;
  DType cache_dtype() const;  // of keys and values
  SlotOptions slot_options(int experts_per_token) const;
};

constexpr int kReadsAtOnce = 8;

}  // namespace flashmoe
