// Products of many tokens at a time: a vector holds rows. The weights of some rows and 16 groups
// are unpacked and transposed so that a 32-bit lane has four columns of its row, and meet the four
// values of a token. Same operations in the same order as row_product().
//
// A table's file of integer dot products says by kTileTokens and kTileBlocks how many tokens and
// 16s of rows are multiplied with one another at a time, so that their sums fit into registers and
// hide how long one product takes; by kHalves whether bytes of weights are taken as halves of 4
// bits.
#pragma once

#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"

#include FLASHMOE_INT8_DOTS

constexpr int kBatchRows = 16;
// Tokens whose partial sums are held, 1 KiB each for 16 rows. They and a tile of the weights are on
// the stack, of which some systems give a thread no more than 128 KiB.
constexpr int batch_tokens(int group) {
  return (group == 128 ? 16 : 32) / kTileTokens * kTileTokens;
}
constexpr int kBatchUnroll = 4;

// The vectors that hold something for B times 16 rows.
template <class Vector, int B>
struct Across {
  Vector part[B * kParts];
};

// Unpacked weights: for each four bytes of a row and each plane of theirs the values of all rows,
// or their halves, the low one first.
template <class Format>
constexpr int kTileHalves = kHalves && Format::kLargest > 15 ? 2 : 1;

// `next` comes from memory into the second-level cache while this is computed with; see
// prefetch_ahead().
template <class Format, int B>
FLASHMOE_INLINE void unpack_rows(const uint8_t* weight, ptrdiff_t row_bytes, int bytes,
                                 const uint8_t* next, Ints* tile) {
  constexpr int kBytes = 4 * kLanes;  // of a row at a time
  constexpr int kVectors = B * kParts;
  for (int at = 0; at < bytes; at += kBytes) {
    const int valid = bytes - at < kBytes ? bytes - at : kBytes;
    for (int part = 0; part < kVectors; ++part) {
      const ptrdiff_t begin = part * kLanes * row_bytes + at;
      for (int r = 0; r < kLanes; ++r) prefetch_far(next + begin + r * row_bytes);
      Ints words[kLanes];
      if (valid == kBytes) {
        load_transposed(weight + begin, row_bytes, words);
      } else {
        uint8_t rows[kLanes * kBytes] = {};
        for (int r = 0; r < kLanes; ++r) {
          __builtin_memcpy(rows + r * kBytes, weight + begin + r * row_bytes,
                           static_cast<size_t>(valid));
        }
        load_transposed(rows, kBytes, words);
      }
      Ints* to = tile + at / 4 * Format::kPlanes * kTileHalves<Format> * kVectors + part;
      for (int word = 0; word < kLanes; ++word) {
        for (int p = 0; p < Format::kPlanes; ++p) {
          const Ints values = Format::values(words[word], p);
          for (int half = 0; half < kTileHalves<Format>; ++half, to += kVectors) {
            *to = kTileHalves<Format> == 1 ? values : values >> (4 * half) & 0x0f0f0f0f;
          }
        }
      }
    }
  }
}

// Adds one block of 16 groups to the partial sums [T][16] of T tokens.
template <class Format, int B, int T>
FLASHMOE_INLINE void batch_tile(const Ints* tile, int count, const Across<Floats, B>* scales,
                                const Across<Floats, B>* biases, const Int8Input& x,
                                const ptrdiff_t* tokens, int first, Across<Floats, B>* sums) {
  constexpr int kVectors = B * kParts;
  constexpr int kPlanes = Format::kPlanes;
  constexpr int kTileParts = kTileHalves<Format>;
  constexpr int kWords = Format::kGroupBytes / 4;
  using Dot = Dots<kTileParts == 2 ? 15 : Format::kLargest>;
  constexpr int kRun = Dot::kRun / kPlanes < kWords ? Dot::kRun / kPlanes : kWords;
  static_assert(kWords % kRun == 0 && (kPlanes == 1 || Format::kGroupBytes <= 64));
  const int8_t* values[T];
  for (int t = 0; t < T; ++t) values[t] = x.values + tokens[t] * x.stride;
  for (int g = 0; g < count; ++g, tile += kWords * kPlanes * kTileParts * kVectors) {
    const ptrdiff_t offset = plane_offset<Format>((first + g) * Format::kGroupBytes);
    Ints dots[T * kVectors] = {};
    for (int half = kTileParts - 1; half >= 0; --half) {
      for (int done = 0; done < kWords; done += kRun) {
        Ints run[T * kVectors] = {};
        FLASHMOE_UNROLL(kBatchUnroll)
        for (int word = done; word < done + kRun; ++word) {
          for (int p = 0; p < kPlanes; ++p) {
            const Ints* weight = tile + ((word * kPlanes + p) * kTileParts + half) * kVectors;
            for (int t = 0; t < T; ++t) {
              int32_t four;
              __builtin_memcpy(&four, values[t] + (offset + word * 4) + p * 64, 4);
              for (int v = 0; v < kVectors; ++v) {
                Ints& sum = run[t * kVectors + v];
                sum = Dot::add(sum, weight[v], Ints{} + four);
              }
            }
          }
        }
        for (int i = 0; i < T * kVectors; ++i) dots[i] += Dot::close(run[i]);
      }
      if (half > 0) {
        for (int i = 0; i < T * kVectors; ++i) dots[i] <<= 4;
      }
    }
    for (int t = 0; t < T; ++t) {
      const ptrdiff_t group = tokens[t] * x.group_stride + first + g;
      for (int v = 0; v < kVectors; ++v) {
        const Floats exact = __builtin_convertvector(dots[t * kVectors + v], Floats);
        const Floats term = scales[g].part[v] * exact + biases[g].part[v] * x.sums[group];
        Floats& sum = sums[t * 16 + g].part[v];
        sum = (first == 0 ? Floats{} : sum) + term * x.scales[group];
      }
    }
  }
}

// The scales or biases of 16 * B rows and 16 groups, as columns: [16 groups][rows]. load(group) has
// those of a row.
template <int B, class Load>
FLASHMOE_INLINE void load_columns(const Load& load, int64_t first, int groups,
                                  Across<Floats, B>* columns) {
  for (int block = 0; block < B; ++block) {
    Block<Floats> rows[16];
    for (int r = 0; r < 16; ++r) {
      rows[r] = load(first + static_cast<int64_t>(block * 16 + r) * groups);
    }
    for (int a = 0; a < kParts; ++a) {
      for (int b = 0; b < kParts; ++b) {
        Ints square[kLanes];
        load_transposed(reinterpret_cast<const uint8_t*>(&rows[a * kLanes].part[b]), sizeof rows[0],
                        square);
        for (int i = 0; i < kLanes; ++i) {
          columns[b * kLanes + i].part[block * kParts + a] = reinterpret_cast<Floats>(square[i]);
        }
      }
    }
  }
}

// Rows [row, row + 16 * B).
template <class Format, int B>
void batch_product(const Rows& rows, int row, const Int8Input& x) {
  constexpr int kGroupBytes = Format::kGroupBytes;
  constexpr int kVectors = B * kParts;
  constexpr int kTokens = batch_tokens(Format::kGroupBytes * Format::kPlanes);
  const Matrix& m = *rows.weight;
  const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(x.groups) * kGroupBytes;
  const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) + row * row_bytes;
  Ints tile[4 * kGroupBytes * Format::kPlanes * kTileHalves<Format> * kVectors];
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
      unpack_rows<Format, B>(here, row_bytes, count * kGroupBytes, next, tile);
      const int64_t first = static_cast<int64_t>(row) * x.groups + g;
      const int64_t ahead = static_cast<int64_t>(B) * 16 * x.groups * Format::kScaleBytes;
      load_columns<B>(
          [&](int64_t group) {
            prefetch_far(m.scales + group * Format::kScaleBytes + ahead);
            return Format::scales(m, group, count);
          },
          first, x.groups, scales);
      load_columns<B>(
          [&](int64_t group) {
            prefetch_far(m.biases + group * Format::kScaleBytes + ahead);
            return Format::biases(m, group, count);
          },
          first, x.groups, biases);
      int t = 0;
      for (; t + kTileTokens - 4 < n; t += kTileTokens) {
        batch_tile<Format, B, kTileTokens>(tile, count, scales, biases, x, tokens + t, g,
                                           sums + t * 16);
      }
      if (t < n) {
        batch_tile<Format, B, 4>(tile, count, scales, biases, x, tokens + t, g, sums + t * 16);
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
