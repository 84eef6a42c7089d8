// Products of many tokens at a time: a vector holds rows. The weights of some rows and 16 groups
// are unpacked and transposed so that a 32-bit lane has four columns of its row, and meet the four
// values of a token. Same operations in the same order as row_product().

constexpr int kBatchRows = 16;
// Tokens whose partial sums are held, 1 KiB each for 16 rows. They and a tile of the weights are on
// the stack, of which some systems give a thread no more than 128 KiB.
constexpr int batch_tokens(int group) {
  return group == 128 ? 16 : 32;
}
// Tokens and 16s of rows that are multiplied with one another at a time: their sums fit into
// registers, and hide how long one product takes.
constexpr int kTileTokens = kLanes == 16 ? 8 : 4;
constexpr int kTileBlocks = kLanes == 16 ? 2 : 1;

// The vectors that hold something for B times 16 rows.
template <class Vector, int B>
struct Across {
  Vector part[B * kParts];
};

// What begins at `next` comes from memory into the second-level cache while this is computed with;
// see prefetch_ahead().
template <int Bits, int Group, int B>
FLASHMOE_INLINE void unpack_rows(const uint8_t* weight, ptrdiff_t row_bytes, int bytes,
                                 const uint8_t* next, Ints* tile) {
  constexpr int kPlanes = 8 / Bits;
  for (int at = 0; at < bytes; at += 4 * kLanes) {
    for (int part = 0; part < B * kParts; ++part) {
      Ints words[kLanes];
      const ptrdiff_t begin = part * kLanes * row_bytes + at;
      const uint8_t* from = weight + begin;
      const int valid = bytes - at < 4 * kLanes ? bytes - at : 4 * kLanes;
      for (int r = 0; r < kLanes; ++r) {
        prefetch_far(next + begin + r * row_bytes);
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
          tile[((at / 4 + word) * kPlanes + p) * B * kParts + part] =
              (words[word] >> (p * Bits)) & kMask;
        }
      }
    }
  }
}

// Adds one block of 16 groups to the partial sums [T][16] of T tokens.
template <int Bits, int Group, int B, int T>
FLASHMOE_INLINE void batch_tile(const Ints* tile, int count, const Across<Floats, B>* scales,
                                const Across<Floats, B>* biases, const Int8Input& x,
                                const ptrdiff_t* tokens, int first, Across<Floats, B>* sums) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kWords = Group * Bits / 32;
  constexpr int kVectors = B * kParts;
  const int8_t* values[T];
  for (int t = 0; t < T; ++t) values[t] = x.values + tokens[t] * x.stride;
  for (int g = 0; g < count; ++g) {
    Across<Ints, B> dots[T] = {};
    for (int word = 0; word < kWords; ++word) {
      const int at = ((first + g) * kWords + word) * 4;
      for (int p = 0; p < kPlanes; ++p) {
        const Ints* weight = tile + ((g * kWords + word) * kPlanes + p) * kVectors;
        for (int t = 0; t < T; ++t) {
          int32_t four;
          __builtin_memcpy(&four, values[t] + at / 64 * 64 * kPlanes + p * 64 + at % 64, 4);
          for (int i = 0; i < kVectors; ++i) {
            dots[t].part[i] = dot_four<Bits>(dots[t].part[i], weight[i], four);
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const ptrdiff_t group = tokens[t] * x.group_stride + first + g;
      for (int i = 0; i < kVectors; ++i) {
        const Floats exact = __builtin_convertvector(dots[t].part[i], Floats);
        const Floats term = scales[g].part[i] * exact + biases[g].part[i] * x.sums[group];
        Floats& sum = sums[t * 16 + g].part[i];
        sum = (first == 0 ? Floats{} : sum) + term * x.scales[group];
      }
    }
  }
}

// The scales or biases of 16 * B rows and `count` <= 16 groups, as columns: [16 groups][rows].
template <DType D, int B>
FLASHMOE_INLINE void load_columns(const std::byte* array, int64_t first, int groups, int count,
                                  Across<Floats, B>* columns) {
  for (int block = 0; block < B; ++block) {
    Block<Floats> rows[16];
    for (int r = 0; r < 16; ++r) {
      const int64_t at = first + static_cast<int64_t>(block * 16 + r) * groups;
      rows[r] = load_block<D>(array, at, count);
      const int64_t ahead = at + static_cast<int64_t>(B * 16) * groups;
      prefetch_far(array + ahead * static_cast<int64_t>(size_of(D)));
    }
    for (int a = 0; a < kParts; ++a) {
      for (int b = 0; b < kParts; ++b) {
        Ints square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = reinterpret_cast<Ints>(rows[a * kLanes + i].part[b]);
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) {
          columns[b * kLanes + i].part[block * kParts + a] = reinterpret_cast<Floats>(square[i]);
        }
      }
    }
  }
}

// Rows [row, row + 16 * B).
template <int Bits, int Group, DType D, int B>
void batch_product(const Rows& rows, int row, const Int8Input& x) {
  constexpr int kGroupBytes = Group * Bits / 8;
  constexpr int kVectors = B * kParts;
  constexpr int kTokens = batch_tokens(Group);
  const Matrix& m = *rows.weight;
  const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(x.groups) * kGroupBytes;
  const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) + row * row_bytes;
  Ints tile[16 * Group / 4 * kVectors];
  Across<Floats, B> scales[16], biases[16], sums[kTokens * 16];
  for (int done = 0; done < rows.n; done += kTokens) {
    const int n = rows.n - done < kTokens ? rows.n - done : kTokens;
    ptrdiff_t tokens[kTokens];  // past the last token that one again, whose sums are not used
    for (int t = 0; t < kTokens; ++t) {
      const int token = done + (t < n ? t : n - 1);
      tokens[t] = rows.inputs ? rows.inputs[token] : token;
    }
    for (int t = 0; t < n; ++t) {  // where the first block leaves sums out
      for (int g = x.groups; g < 16; ++g) sums[t * 16 + g] = {};
    }
    for (int g = 0; g < x.groups; g += 16) {
      const int count = x.groups - g < 16 ? x.groups - g : 16;
      const uint8_t* here = weight + g * kGroupBytes;
      const uint8_t* next =
          g + 16 < x.groups ? here + 16 * kGroupBytes : weight + B * 16 * row_bytes;
      unpack_rows<Bits, Group, B>(here, row_bytes, count * kGroupBytes, next, tile);
      const int64_t first = static_cast<int64_t>(row) * x.groups + g;
      load_columns<D, B>(m.scales, first, x.groups, count, scales);
      load_columns<D, B>(m.biases, first, x.groups, count, biases);
      int t = 0;
      for (; t + kTileTokens - 4 < n; t += kTileTokens) {
        batch_tile<Bits, Group, B, kTileTokens>(tile, count, scales, biases, x, tokens + t, g,
                                                sums + t * 16);
      }
      if (t < n) {
        batch_tile<Bits, Group, B, 4>(tile, count, scales, biases, x, tokens + t, g, sums + t * 16);
      }
    }
    for (int t = 0; t < n; ++t) {
      Across<Floats, B>* partial = sums + t * 16;
      const ptrdiff_t output = rows.outputs ? rows.outputs[done + t] : done + t;
      float* out = rows.out + output * rows.out_stride + row;
      for (int i = 0; i < kVectors; ++i) {
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
