#include "experts/slots.h"

#include <algorithm>

#include "core/round.h"

namespace flashmoe {
namespace {

// Bytes between two parts that are read for nothing rather than with a read of their own.
constexpr int64_t kMaxGap = 4096;

}  // namespace

int experts_in(const ExpertsSpec& layer) {
  return static_cast<int>(layer.extents.size()) / layer.parts();
}

SlotLayout slot_layout(const ExpertsSpec& layer, int expert, const SlotOptions& options) {
  const int64_t alignment = options.alignment;
  SlotLayout result;
  const Extent* extent = &layer.extents[static_cast<size_t>(expert) * layer.parts()];
  for (int part = 0; part < layer.parts(); ++part, ++extent) {
    // A direct read begins and ends at whole units, in the file and in the slot, where a part then
    // lies as aligned as in the file. If that is not enough for kernels, the page cache reads it.
    const bool direct =
        options.direct && (File::kDirectUnit == 1 || extent->offset % alignment == 0);
    const int64_t unit = direct ? File::kDirectUnit : 1;
    const int64_t begin = round_down(extent->offset, unit);
    const int64_t end = extent->offset + extent->length;
    SlotLayout::Read* last = result.reads.empty() ? nullptr : &result.reads.back();
    // Neighbours in the file are one read, where the next part then lies as it should.
    const int64_t gap = last ? begin - (last->offset + last->length) : -1;
    if (last && last->file == extent->file && last->direct == direct &&
        extent->offset >= last->offset && gap <= kMaxGap &&
        (extent->offset - last->offset + last->slot_offset) % alignment == 0) {
      last->length = std::max(last->length, end - last->offset);
    } else {
      const int64_t slot_offset = round_up(result.bytes, std::max(unit, alignment));
      result.reads.push_back({extent->file, begin, end - begin, slot_offset, direct});
      last = &result.reads.back();
    }
    result.parts[part] = last->slot_offset + extent->offset - last->offset;
    result.bytes = last->slot_offset + round_up(last->length, unit);
  }
  return result;
}

Slots slots_for(const std::vector<ExpertsSpec>& layers, const SlotOptions& options) {
  int64_t largest = 0, total = 0;
  for (const ExpertsSpec& layer : layers) {
    const int experts = experts_in(layer);
    for (int expert = 0; expert < experts; ++expert) {
      largest = std::max(largest, slot_layout(layer, expert, options).bytes);
    }
    total += experts;
  }
  // Huge pages and DMA like 2 MiB boundaries; in a cache the rounding would cost slots.
  constexpr int64_t kHugePage = 2 << 20, kPage = 16 << 10;
  const bool huge = largest >= kHugePage && options.cache_bytes == 0;
  const int64_t stride = round_up(largest, huge ? kHugePage : kPage);
  const int64_t wanted = std::max<int64_t>(options.min_slots, options.cache_bytes / stride);
  return {std::min(total, wanted), stride};
}

bool can_read_direct(const std::vector<std::unique_ptr<File>>& files,
                     const std::vector<ExpertsSpec>& layers) {
  for (const ExpertsSpec& layer : layers) {
    for (const Extent& extent : layer.extents) {
      if (!files[extent.file]->open_direct()) return false;
    }
  }
  return true;
}

}  // namespace flashmoe
