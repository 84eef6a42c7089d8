// Rows of the embedding table as activations.
#include "common.h"

kernel void embed(device const int* ids [[buffer(kEmbedIds)]],
                  device const uchar* weight [[buffer(kEmbedWeight)]],
                  device const uchar* scales [[buffer(kEmbedScales)]],
                  device const uchar* biases [[buffer(kEmbedBiases)]],
                  device float* out [[buffer(kEmbedOut)]],
                  constant EmbedArguments& args [[buffer(kEmbedArguments)]],
                  uint3 position [[thread_position_in_grid]]) {
  const uint column = position.x, token = position.y;
  if (column >= args.columns) return;
  const Stored table = {weight, scales, biases};
  out[ulong(token) * args.columns + column] =
      weight_at(first_format(), table, ulong(ids[token]), args.columns, column);
}
