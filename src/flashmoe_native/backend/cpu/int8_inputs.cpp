#include "backend/cpu/int8_inputs.h"

#include <cstring>

#include "core/round.h"

namespace flashmoe {
namespace {

size_t row_bytes(const Matrix& weight) {
  return static_cast<size_t>(weight.cols) * static_cast<size_t>(weight.bits) / 8;
}

// A copy begins at a whole plane.
int copies_of(const Matrix& weight) {
  const int groups = weight.cols / weight.group;
  return 16 % groups == 0 && row_bytes(weight) % 64 == 0 ? 16 / groups : 1;
}

}  // namespace

size_t int8_bytes(const Matrix& weight, int n) {
  const size_t row = round_up(row_bytes(weight) * static_cast<size_t>(copies_of(weight)), 64);
  const size_t groups = round_up(static_cast<size_t>(weight.cols / weight.group), 16);
  return static_cast<size_t>(n) * (row * 8 / weight.bits + 2 * sizeof(float) * groups);
}

Int8Input make_int8_input(const Matrix& weight, int n, std::byte* memory) {
  Int8Input input;
  input.bits = weight.bits;
  input.group = weight.group;
  input.groups = weight.cols / weight.group;
  const size_t planes = 8 / static_cast<size_t>(weight.bits);
  input.copies = copies_of(weight);
  const size_t row = row_bytes(weight) * static_cast<size_t>(input.copies);
  input.stride = static_cast<ptrdiff_t>(round_up(row, 64) * planes);
  input.group_stride = static_cast<int>(round_up(static_cast<size_t>(input.groups), 16));
  const size_t scales = static_cast<size_t>(n) * static_cast<size_t>(input.group_stride);
  input.scales = reinterpret_cast<float*>(memory);
  input.sums = input.scales + scales;
  input.values = reinterpret_cast<int8_t*>(input.sums + scales);
  for (int t = 0; t < n; ++t) {
    const int filled = input.copies * input.groups;
    const ptrdiff_t at = ptrdiff_t{t} * input.group_stride + filled;
    const size_t padding = static_cast<size_t>(input.group_stride - filled) * sizeof(float);
    std::memset(input.scales + at, 0, padding);
    std::memset(input.sums + at, 0, padding);
    if (row % 64 != 0) {
      std::memset(input.values + (t + 1) * input.stride - 64 * planes, 0, 64 * planes);
    }
  }
  return input;
}

void Int8Inputs::begin(int n, int cols) {
  n_ = n;
  cols_ = cols;
  for (Format& format : formats_) format.wanted = false;
  for (const int32_t token : needed_) is_needed_[static_cast<size_t>(token)] = false;
  needed_.clear();
  if (is_needed_.size() < static_cast<size_t>(n)) is_needed_.resize(static_cast<size_t>(n));
}

void Int8Inputs::want(const Matrix& weight) {
  if (weight.bits == 0) return;
  Format& format = formats_[Int8Inputs::format(weight)];
  if (format.wanted) return;
  format.wanted = true;
  std::byte* memory = format.memory.get<std::byte>(int8_bytes(weight, n_));
  format.input = make_int8_input(weight, n_, memory);
}

int64_t Int8Inputs::bytes() const {
  int64_t total = 0;
  for (const Format& format : formats_) total += format.memory.bytes();
  return total;
}

void Int8Inputs::need(std::span<const int32_t> tokens) {
  for (const int32_t token : tokens) {
    if (is_needed_[static_cast<size_t>(token)]) continue;
    needed_.push_back(token);  // may throw, and what is only marked would never be unmarked
    is_needed_[static_cast<size_t>(token)] = true;
  }
}

void Int8Inputs::quantize(const float* row, int token) {
  for (const Format& format : formats_) {
    if (!format.wanted) continue;
    kernels_.quantize(row, token, 0, format.input.groups, format.input);
  }
}

}  // namespace flashmoe
