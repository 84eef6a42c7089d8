// Rows of the embedding table as activations.
#include "common.h"

KERNEL(embed, kEmbedThreads)(constant EmbedArguments& args [[buffer(0)]],
                             uint3 position [[thread_position_in_grid]]) {
  device const int* ids = args.ids;
  device float* out = args.out;
  const uint column = position.x, token = position.y;
  if (column >= args.columns) return;
  out[ulong(token) * args.columns + column] =
      weight_at(first_format(), stored(args.table), ulong(ids[token]), args.columns, column);
}
