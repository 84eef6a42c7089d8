// Where weights lie: what Python found in a checkpoint's metadata and validated.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace flashmoe {

struct Extent {
  int file = 0;  // index into CheckpointSpec::files
  int64_t offset = 0;
  int64_t length = 0;
};

// Rows × columns, dense (bits 0) or affine-quantized; backend.h says how. The dtype is of the
// elements, or of scales and biases where quantized.
struct Format {
  int rows = 0, cols = 0;
  DType dtype = DType::F32;
  int bits = 0, group = 0;

  int parts() const { return bits ? 3 : 1; }
  // Bytes of weight (part 0), scales (1) and biases (2).
  int64_t part_bytes(int part) const {
    const int64_t cells = int64_t{rows} * cols;
    if (part > 0) return cells / group * static_cast<int64_t>(size_of(dtype));
    return bits ? cells * bits / 8 : cells * static_cast<int64_t>(size_of(dtype));
  }
};

// Each part is the concatenation of its extents: one for a tensor stored as it is used, several
// where rows are gathered (Qwen3-Next stores its projections interleaved).
struct MatrixSpec {
  Format format;
  std::vector<Extent> parts[3];
};

struct VectorSpec {
  int64_t length = 0;
  DType dtype = DType::F32;
  std::vector<Extent> extents;
  bool plus_one = false;  // a zero-centred norm: 1 is added as it is read
};

// The routed experts of one layer: extents[expert * parts + part], parts in the order gate weight
// [scales biases], up …, down ….
struct ExpertsSpec {
  Format gate, up, down;
  std::vector<Extent> extents;

  int parts() const { return gate.parts() + up.parts() + down.parts(); }
};

struct CheckpointSpec {
  std::vector<std::string> files;
  std::map<std::string, MatrixSpec> matrices;
  std::map<std::string, VectorSpec> vectors;
  std::vector<ExpertsSpec> experts;  // one a layer
};

}  // namespace flashmoe
