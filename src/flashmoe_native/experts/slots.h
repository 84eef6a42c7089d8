// How experts lie in slots, and the reads that bring them there.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/file.h"
#include "core/spec.h"

namespace flashmoe {

constexpr int kMaxParts = 9;  // weight, scales and biases of gate, up and down

struct SlotOptions {
  // Slots to have at least: a token's experts being computed, and as many being read.
  int min_slots = 1;
  // As many slots as fit into it, but no more than there are experts.
  int64_t cache_bytes = 0;
  // Reads past the page cache, where can_read_direct(): what is in a slot is not there as well.
  bool direct = false;
  int64_t alignment = 1;  // of a part in its slot, as WeightRules have it
};

struct Slots {
  int64_t count, stride;  // bytes of one

  int64_t bytes() const { return count * stride; }
};

struct SlotLayout {
  struct Read {
    int file;
    int64_t offset, length, slot_offset;
    bool direct;  // past the page cache
  };
  std::vector<Read> reads;
  std::array<int64_t, kMaxParts> parts;  // where they begin in the slot
  int64_t bytes = 0;
};

int experts_in(const ExpertsSpec& layer);
SlotLayout slot_layout(const ExpertsSpec& layer, int expert, const SlotOptions& options);
// Slots that any expert of any layer fits into.
Slots slots_for(const std::vector<ExpertsSpec>& layers, const SlotOptions& options);
// Whether every file with experts may be read past the page cache.
bool can_read_direct(const std::vector<std::unique_ptr<File>>& files,
                     const std::vector<ExpertsSpec>& layers);

}  // namespace flashmoe
