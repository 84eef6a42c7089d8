#include "model/placement.h"

#include <algorithm>

#include "core/round.h"

namespace flashmoe {
namespace {

constexpr int64_t kAlignment = 64;                 // of a tensor: a cache line
constexpr int64_t kSharedBlock = 1 << 20;          // that tensors below a quarter of it share
constexpr int64_t kMaxGap = 1 << 20;               // between tensors that are mapped together
constexpr int64_t kLongestRun = int64_t{4} << 30;  // what is mapped together at most

int64_t end_of(const Extent& extent) {
  return extent.offset + extent.length;
}

}  // namespace

Placement::Placement(const CheckpointSpec& spec, const WeightRules& rules) : rules_(rules) {
  if (rules_.maps) find_runs(spec);
}

bool Placement::mappable(int64_t bytes, const std::vector<Extent>& extents) const {
  return rules_.maps && extents.size() == 1 && bytes > kSharedBlock / 4 &&
         extents.front().offset % rules_.alignment == 0;
}

void Placement::find_runs(const CheckpointSpec& spec) {
  std::map<int, std::vector<Extent>> files;
  for (const auto& [name, matrix] : spec.matrices) {
    for (int part = 0; part < matrix.format.parts(); ++part) {
      const std::vector<Extent>& extents = matrix.parts[part];
      if (!mappable(matrix.format.part_bytes(part), extents)) continue;
      files[extents.front().file].push_back(extents.front());
    }
  }
  for (auto& [file, extents] : files) {
    std::sort(extents.begin(), extents.end(),
              [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
    std::vector<Run>& runs = runs_[file];
    for (const Extent& extent : extents) {
      Extent* last = runs.empty() ? nullptr : &runs.back().extent;
      if (last && extent.offset - end_of(*last) <= kMaxGap &&
          end_of(extent) - last->offset <= kLongestRun) {
        last->length = std::max(end_of(*last), end_of(extent)) - last->offset;
      } else {
        runs.push_back({extent});
      }
    }
  }
}

Placement::Place Placement::put(int64_t bytes, const std::vector<Extent>& extents) {
  if (mappable(bytes, extents)) {
    const Extent& extent = extents.front();
    for (Run& run : runs_[extent.file]) {
      if (run.refused || extent.offset < run.extent.offset || end_of(extent) > end_of(run.extent)) {
        continue;
      }
      if (!run.piece) {
        run.piece = pieces_.size();
        pieces_.push_back({run.extent.length, run.extent});
      }
      bytes_ += bytes;
      mapped_bytes_ += bytes;
      return {*run.piece, extent.offset - run.extent.offset};
    }
  }
  bytes = round_up(bytes, kAlignment);
  bytes_ += bytes;
  if (bytes > kSharedBlock / 4) {
    pieces_.push_back({bytes, {}});
    return {pieces_.size() - 1, 0};
  }
  if (bytes > block_left_) {
    pieces_.push_back({kSharedBlock, {}});
    block_ = {pieces_.size() - 1, 0};
    block_left_ = kSharedBlock;
  }
  const Place result = block_;
  block_.offset += bytes;
  block_left_ -= bytes;
  return result;
}

void Placement::refuse(const Place& place, int64_t bytes) {
  bytes_ -= bytes;
  mapped_bytes_ -= bytes;
  for (Run& run : runs_[pieces_[place.piece].mapped->file]) {
    if (run.piece == place.piece) run.refused = true;
  }
}

}  // namespace flashmoe
