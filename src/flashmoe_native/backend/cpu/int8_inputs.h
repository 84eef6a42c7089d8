// One input vector or batch, quantized once for every format of matrix that will read it.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "backend/cpu/kernels.h"
#include "core/memory.h"

namespace flashmoe {

// Bytes of the quantized input of a matrix with this format, for n tokens.
size_t int8_bytes(const Matrix& weight, int n);
// Lays it out in `memory` (64-byte aligned) with its padding zeroed.
Int8Input make_int8_input(const Matrix& weight, int n, std::byte* memory);

class Int8Inputs {
 public:
  explicit Int8Inputs(const Kernels& kernels) : kernels_(kernels) {}

  // A new input of n tokens: nothing is wanted yet.
  void begin(int n, int cols);
  // Announces a matrix that will read it; a dense one wants nothing.
  void want(const Matrix& weight);
  // Announces tokens that will be read; those announced so far, each once.
  void need(std::span<const int32_t> tokens);
  std::span<const int32_t> needed() const { return needed_; }
  // One token in every wanted format; different tokens may be quantized at the same time.
  void quantize(const float* row, int token);
  const Int8Input& get(const Matrix& weight) const { return formats_[format(weight)].input; }
  int64_t bytes() const;

  // bits 2, 4, 8 by group 32, 64, 128.
  static constexpr size_t kFormats = 9;
  static size_t format(const Matrix& weight) {
    return static_cast<size_t>(weight.bits / 4 * 3 + weight.group / 64);
  }

 private:
  struct Format {
    bool wanted = false;
    Int8Input input;
    Scratch memory;
  };

  const Kernels& kernels_;
  std::array<Format, kFormats> formats_;
  int n_ = 0, cols_ = 0;
  std::vector<bool> is_needed_;
  std::vector<int32_t> needed_;
};

}  // namespace flashmoe
