#include "quantize/affine.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace flashmoe {

namespace {

using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy>;

// bfloat16, which numpy lacks, travels as uint16.
nb::dlpack::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return nb::dtype<float>();
    case DType::F16:
      return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    default:
      return nb::dtype<uint16_t>();
  }
}

DType stored_dtype(const Input& array, const char* name) {
  for (DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    if (array.dtype() == numpy_dtype(dtype)) return dtype;
  }
  throw std::invalid_argument(std::string(name) +
                              " must be float32, float16 or uint16 (holding bfloat16)");
}

std::vector<size_t> shape_of(const Input& array) {
  return {array.shape_ptr(), array.shape_ptr() + array.ndim()};
}

// A numpy array that owns `bytes`.
Output adopt(std::unique_ptr<std::byte[]> bytes, const std::vector<size_t>& shape,
             nb::dlpack::dtype dtype) {
  nb::capsule owner(bytes.get(), [](void* p) noexcept { delete[] static_cast<std::byte*>(p); });
  return Output(bytes.release(), shape.size(), shape.data(), owner, nullptr, dtype);
}

std::unique_ptr<std::byte[]> allocate(size_t count, size_t size) {
  return std::unique_ptr<std::byte[]>(new std::byte[count * size]);
}

nb::tuple quantize(const Input& weight, const std::string& dtype, int bits, int group) {
  const DType from = stored_dtype(weight, "weight");
  const AffineFormat format{bits, group, parse_dtype(dtype)};
  check(format);
  std::vector<size_t> shape = shape_of(weight);
  if (shape.empty() || shape.back() % group != 0) {
    throw std::invalid_argument("the last axis of weight must divide by the group of " +
                                std::to_string(group));
  }
  const size_t columns = shape.back();
  const size_t groups = weight.size() / group;
  const size_t words_count = weight.size() * bits / 32;
  auto words = allocate(words_count, 4);
  auto scales = allocate(groups, size_of(format.dtype));
  auto biases = allocate(groups, size_of(format.dtype));
  int64_t bad;
  {
    const Unlocked unlocked;
    bad = quantize_affine(weight.data(), from, static_cast<int64_t>(groups), format,
                          reinterpret_cast<uint32_t*>(words.get()), scales.get(), biases.get());
  }
  if (bad >= 0) {
    const size_t element = static_cast<size_t>(bad) * group;
    throw nb::value_error(("weights are not finite, or too large, in row " +
                           std::to_string(element / columns) + ", columns " +
                           std::to_string(element % columns) + " to " +
                           std::to_string(element % columns + group - 1))
                              .c_str());
  }
  std::vector<size_t> word_shape = shape;
  word_shape.back() = columns * bits / 32;
  shape.back() = columns / group;
  return nb::make_tuple(adopt(std::move(words), word_shape, nb::dtype<uint32_t>()),
                        adopt(std::move(scales), shape, numpy_dtype(format.dtype)),
                        adopt(std::move(biases), shape, numpy_dtype(format.dtype)));
}

Output dequantize(const Input& words, const Input& scales, const Input& biases, int bits,
                  int group) {
  const AffineFormat format{bits, group, stored_dtype(scales, "scales")};
  check(format);
  std::vector<size_t> shape = shape_of(words);
  std::vector<size_t> expected = shape;
  if (words.dtype() != nb::dtype<uint32_t>() || shape.empty() ||
      shape.back() * 32 % (static_cast<size_t>(bits) * group) != 0) {
    throw std::invalid_argument("words must be uint32 whose last axis holds whole groups");
  }
  shape.back() = shape.back() * 32 / bits;
  expected.back() = shape.back() / group;
  if (shape_of(scales) != expected || shape_of(biases) != expected ||
      biases.dtype() != scales.dtype()) {
    throw std::invalid_argument(
        "scales and biases must be of one type and have one element for each group of words");
  }
  auto weights = allocate(scales.size() * group, sizeof(float));
  {
    const Unlocked unlocked;
    dequantize_affine(static_cast<const uint32_t*>(words.data()), scales.data(), biases.data(),
                      static_cast<int64_t>(scales.size()), format,
                      reinterpret_cast<float*>(weights.get()));
  }
  return adopt(std::move(weights), shape, nb::dtype<float>());
}

}  // namespace

void bind_quantize(nb::module_& m) {
  using namespace nb::literals;
  m.def("quantize", &quantize, "weight"_a, "dtype"_a, "bits"_a, "group"_a);
  m.def("dequantize", &dequantize, "words"_a, "scales"_a, "biases"_a, "bits"_a, "group"_a);
}

}  // namespace flashmoe
