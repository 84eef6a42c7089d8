// Matrix products with float32 inputs. A piece of four rows is widened or dequantized to float32,
// then used for every token; an element of the result is the sum of kLanes partial sums over the
// columns.
#pragma once

#include "backend/cpu/simd.inl"

constexpr int kRowTile = 4;
constexpr int kTokenTile = 4;
constexpr int kColumns = 1024;  // widened at a time: 4 rows are 16 KiB
constexpr int kTokenBlock = 64;

template <int Bits>
FLASHMOE_INLINE void dequantize(const uint8_t* packed, int count, float scale, float bias,
                                float* out) {
  constexpr int kEach = 8 / Bits;
  for (int byte = 0; byte < count / kEach; ++byte) {
    for (int i = 0; i < kEach; ++i) {
      const int q = (packed[byte] >> (i * Bits)) & ((1 << Bits) - 1);
      out[byte * kEach + i] = static_cast<float>(q) * scale + bias;
    }
  }
}

// Columns [begin, begin + count) of a row; both multiples of the group where quantized.
void expand(const Matrix& m, int64_t row, int begin, int count, float* out) {
  const int64_t cell = row * m.cols + begin;
  if (m.bits == 0) {
    const std::byte* from = m.weight + cell * static_cast<int64_t>(size_of(m.dtype));
    switch (m.dtype) {
      case DType::F32:
        __builtin_memcpy(out, from, sizeof(float) * static_cast<size_t>(count));
        break;
      case DType::F16:
        for (int i = 0; i < count; ++i) out[i] = load_float(from, DType::F16, i);
        break;
      case DType::BF16:
        for (int i = 0; i < count; ++i) out[i] = load_float(from, DType::BF16, i);
        break;
    }
    return;
  }
  const auto* packed = reinterpret_cast<const uint8_t*>(m.weight + cell * m.bits / 8);
  for (int i = 0; i < count; i += m.group) {
    const size_t group = static_cast<size_t>((cell + i) / m.group);
    const float scale = load_float(m.scales, m.dtype, group);
    const float bias = load_float(m.biases, m.dtype, group);
    const uint8_t* from = packed + i * m.bits / 8;
    if (m.bits == 2) dequantize<2>(from, m.group, scale, bias, out + i);
    if (m.bits == 4) dequantize<4>(from, m.group, scale, bias, out + i);
    if (m.bits == 8) dequantize<8>(from, m.group, scale, bias, out + i);
  }
}

void expand_row(const Matrix& m, int64_t row, float* out) {
  expand(m, row, 0, m.cols, out);
}

// Adds w[r] · x[t] over `count` columns to the partial sums [T][kRowTile].
template <int R, int T>
FLASHMOE_INLINE void dot_tile(const float* w, const float* const* x, int count, Floats* partial) {
  Floats acc[T][R];
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) acc[t][r] = partial[t * kRowTile + r];
  }
  const auto step = [&](int i, int lanes) __attribute__((always_inline)) {
    Floats row[R];
    for (int r = 0; r < R; ++r) row[r] = load(w + r * kColumns + i);
    for (int t = 0; t < T; ++t) {
      const Floats value = load(x[t] + i, lanes);
      for (int r = 0; r < R; ++r) acc[t][r] = multiply_add(row[r], value, acc[t][r]);
    }
  };
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) step(i, kLanes);
  if (i < count) step(i, count - i);
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) partial[t * kRowTile + r] = acc[t][r];
  }
}

template <int R>
void matmul_float_rows(const Rows& rows, const float* x, int row) {
  const Matrix& m = *rows.weight;
  alignas(64) float w[R * kColumns];
  Floats partial[kTokenBlock * kRowTile];
  const float* inputs[kTokenBlock];
  for (int first = 0; first < rows.n; first += kTokenBlock) {
    const int n = rows.n - first < kTokenBlock ? rows.n - first : kTokenBlock;
    for (int i = 0; i < n * kRowTile; ++i) partial[i] = Floats{};
    for (int column = 0; column < m.cols; column += kColumns) {
      const int count = m.cols - column < kColumns ? m.cols - column : kColumns;
      for (int r = 0; r < R; ++r) {
        float* out = w + r * kColumns;
        expand(m, row + r, column, count, out);
        for (int i = count; i % kLanes != 0; ++i) out[i] = 0;
      }
      for (int t = 0; t < n; ++t) {
        const ptrdiff_t input = rows.inputs ? rows.inputs[first + t] : first + t;
        inputs[t] = x + input * m.cols + column;
      }
      int t = 0;
      for (; t + kTokenTile <= n; t += kTokenTile) {
        dot_tile<R, kTokenTile>(w, inputs + t, count, partial + t * kRowTile);
      }
      for (; t < n; ++t) dot_tile<R, 1>(w, inputs + t, count, partial + t * kRowTile);
    }
    for (int t = 0; t < n; ++t) {
      const ptrdiff_t output = rows.outputs ? rows.outputs[first + t] : first + t;
      float* out = rows.out + output * rows.out_stride + row;
      for (int r = 0; r < R; ++r) {
        const float value = sum(partial[t * kRowTile + r]);
        out[r] = rows.add ? out[r] + value : value;
      }
    }
  }
}

void matmul_float(const Rows& rows, const float* x) {
  int row = rows.begin;
  for (; row + kRowTile <= rows.end; row += kRowTile) matmul_float_rows<kRowTile>(rows, x, row);
  for (; row < rows.end; ++row) matmul_float_rows<1>(rows, x, row);
}
