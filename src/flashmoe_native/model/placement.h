// Which memory each resident tensor gets. Decided without any memory, so that what a model would
// take can be said before it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "backend/backend.h"
#include "core/spec.h"

namespace flashmoe {

class Placement {
 public:
  // Pages of a file, which may hold several tensors, or memory of a backend's.
  struct Piece {
    int64_t bytes;
    std::optional<Extent> mapped;
  };
  struct Place {
    size_t piece;  // index into pieces()
    int64_t offset;
  };

  Placement(const CheckpointSpec& spec, const WeightRules& rules);

  // For `bytes` of a tensor that is read, or is computed where there are no extents.
  Place put(int64_t bytes, const std::vector<Extent>& extents = {});
  // What was put there cannot be mapped, nor what follows in these pages: put it once more.
  void refuse(const Place& place, int64_t bytes);

  // In the order in which they came to be needed.
  const std::vector<Piece>& pieces() const { return pieces_; }
  int64_t bytes() const { return bytes_; }                // of tensors, as far as they are rounded
  int64_t mapped_bytes() const { return mapped_bytes_; }  // of them, in pages of their files

 private:
  struct Run {  // neighbours in a file, mapped together
    Extent extent;
    std::optional<size_t> piece = {};
    bool refused = false;
  };

  bool mappable(int64_t bytes, const std::vector<Extent>& extents) const;
  void find_runs(const CheckpointSpec& spec);

  const WeightRules rules_;
  std::map<int, std::vector<Run>> runs_;  // by file, in order
  std::vector<Piece> pieces_;
  Place block_{0, 0};  // what is left of a block that small tensors share
  int64_t block_left_ = 0;
  int64_t bytes_ = 0, mapped_bytes_ = 0;
};

}  // namespace flashmoe
