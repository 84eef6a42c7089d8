// Products of many tokens at a time: a vector holds rows. The weights of 16 rows and 16 groups are
// unpacked and transposed so that a 32-bit lane has four columns of its row, and meet the four
// values of a token. Same operations in the same order as row_product().

constexpr int kBatchRows = 16;
constexpr int kBatchTokens = 32;  // whose partial sums are held: 32 KiB

template <int Bits, int Group>
FLASHMOE_INLINE void unpack_rows(const uint8_t* weight, ptrdiff_t row_bytes, int bytes,
                                 Ints* tile) {
  constexpr int kPlanes = 8 / Bits;
  for (int at = 0; at < bytes; at += 4 * kLanes) {
    for (int part = 0; part < kParts; ++part) {
      Ints words[kLanes];
      const uint8_t* from = weight + part * kLanes * row_bytes + at;
      const int valid = bytes - at < 4 * kLanes ? bytes - at : 4 * kLanes;
      for (int r = 0; r < kLanes; ++r) {
        if (valid == 4 * kLanes) {
          __builtin_memcpy(&words[r], from + r * row_bytes, 4 * kLanes);
        } else {
          words[r] = Ints{};
          __builtin_memcpy(&words[r], from + r * row_bytes, static_cast<size_t>(valid));
        }
      }
      transpose(words);
      constexpr int32_t kMask = static_cast<int32_t>(0x01010101u * ((1u << Bits) - 1));
      for (int word = 0; word < valid / 4; ++word) {
        for (int p = 0; p < kPlanes; ++p) {
          tile[((at / 4 + word) * kPlanes + p) * kParts + part] =
              (words[word] >> (p * Bits)) & kMask;
        }
      }
    }
  }
}

// Adds one block of 16 groups to the partial sums [T][16][kParts] of T tokens.
template <int Bits, int Group, int T>
FLASHMOE_INLINE void batch_tile(const Ints* tile, int count, const Block<Floats>* scales,
                                const Block<Floats>* biases, const Int8Input& x,
                                const ptrdiff_t* tokens, int first, Block<Floats>* sums) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kWords = Group * Bits / 32;
  const int8_t* values[T];
  for (int t = 0; t < T; ++t) values[t] = x.values + tokens[t] * x.stride;
  for (int g = 0; g < count; ++g) {
    Block<Ints> dots[T] = {};
    for (int word = 0; word < kWords; ++word) {
      const int at = ((first + g) * kWords + word) * 4;
      for (int p = 0; p < kPlanes; ++p) {
        const Ints* weight = tile + ((g * kWords + word) * kPlanes + p) * kParts;
        for (int t = 0; t < T; ++t) {
          int32_t four;
          __builtin_memcpy(&four, values[t] + at / 64 * 64 * kPlanes + p * 64 + at % 64, 4);
          for (int i = 0; i < kParts; ++i) {
            dots[t].part[i] = dot_four<Bits>(dots[t].part[i], weight[i], four);
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const ptrdiff_t group = tokens[t] * x.group_stride + first + g;
      for (int i = 0; i < kParts; ++i) {
        const Floats exact = __builtin_convertvector(dots[t].part[i], Floats);
        const Floats term = scales[g].part[i] * exact + biases[g].part[i] * x.sums[group];
        sums[t * 16 + g].part[i] += term * x.scales[group];
      }
    }
  }
}

// [16 rows][16 groups] to [16 groups][16 rows].
FLASHMOE_INLINE void transpose_block(Block<Floats> (&rows)[16]) {
  Block<Floats> columns[16];
  for (int a = 0; a < kParts; ++a) {
    for (int b = 0; b < kParts; ++b) {
      Ints square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = reinterpret_cast<Ints>(rows[a * kLanes + i].part[b]);
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) {
        columns[b * kLanes + i].part[a] = reinterpret_cast<Floats>(square[i]);
      }
    }
  }
  for (int i = 0; i < 16; ++i) rows[i] = columns[i];
}

template <int Bits, int Group, DType D>
void batch_product(const Rows& rows, int row, const Int8Input& x) {
  constexpr int kGroupBytes = Group * Bits / 8;
  const Matrix& m = *rows.weight;
  const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(x.groups) * kGroupBytes;
  const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) + row * row_bytes;
  Ints tile[16 * Group / 4 * kParts];
  Block<Floats> scales[16], biases[16], sums[kBatchTokens * 16];
  for (int done = 0; done < rows.n; done += kBatchTokens) {
    const int n = rows.n - done < kBatchTokens ? rows.n - done : kBatchTokens;
    ptrdiff_t tokens[kBatchTokens];
    for (int t = 0; t < n; ++t) tokens[t] = rows.inputs ? rows.inputs[done + t] : done + t;
    for (int i = 0; i < n * 16; ++i) sums[i] = {};
    for (int g = 0; g < x.groups; g += 16) {
      const int count = x.groups - g < 16 ? x.groups - g : 16;
      unpack_rows<Bits, Group>(weight + g * kGroupBytes, row_bytes, count * kGroupBytes, tile);
      for (int r = 0; r < 16; ++r) {
        const int64_t first = static_cast<int64_t>(row + r) * x.groups + g;
        scales[r] = load_block<D>(m.scales, first, count);
        biases[r] = load_block<D>(m.biases, first, count);
      }
      transpose_block(scales);
      transpose_block(biases);
      int t = 0;
      for (; t + 8 <= n; t += 8) {
        batch_tile<Bits, Group, 8>(tile, count, scales, biases, x, tokens + t, g, sums + t * 16);
      }
      for (; t + 2 <= n; t += 2) {
        batch_tile<Bits, Group, 2>(tile, count, scales, biases, x, tokens + t, g, sums + t * 16);
      }
      for (; t < n; ++t) {
        batch_tile<Bits, Group, 1>(tile, count, scales, biases, x, tokens + t, g, sums + t * 16);
      }
    }
    for (int t = 0; t < n; ++t) {
      Block<Floats>* partial = sums + t * 16;
      const ptrdiff_t output = rows.outputs ? rows.outputs[done + t] : done + t;
      float* out = rows.out + output * rows.out_stride + row;
      for (int i = 0; i < kParts; ++i) {
        for (int half = 8; half > 0; half /= 2) {
          for (int lane = 0; lane < half; ++lane) {
            partial[lane].part[i] += partial[lane + half].part[i];
          }
        }
        const Floats value = partial[0].part[i];
        store(out + i * kLanes, rows.add ? load(out + i * kLanes) + value : value);
      }
    }
  }
}
