// What a model would take in a setting, without reading a weight and without a device. The code
// that allocates says how much: what an open engine reports is the same number.
#pragma once

#include <cstdint>

#include "core/spec.h"
#include "model/config.h"
#include "model/setting.h"

namespace flashmoe {

struct Needs {  // bytes
  // Weights that every token needs, and of them those that are pages of their files, not copies.
  int64_t resident = 0, mapped = 0;
  // Slots for experts in this setting; with a cache for all of them; and with one, of one expert.
  int64_t slots = 0, all_slots = 0, slot = 0;
  // The arrays of a forward pass of a whole chunk.
  int64_t activations = 0;
  // Of a sequence: the recurrent states, keys and values of one token, and both for `context`
  // tokens that come a chunk at a time, with the room that caches have grown to.
  int64_t recurrent = 0, token = 0, state = 0;
  // What the backend works in, when a chunk ends at `context`. Nothing is known of a GPU's.
  int64_t scratch = 0;
};

// The recurrent states that a forward pass writes are an engine's own: it takes `recurrent` once
// more. Throws CheckpointError for a weight that there is not, and std::invalid_argument.
Needs needs_of(const ModelConfig& config, const CheckpointSpec& spec, const Setting& setting,
               int64_t context);

}  // namespace flashmoe
