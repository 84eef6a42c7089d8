// The memory that the CPU's operations work in: what each asks for, and what a forward pass comes
// to, which can be said before there is a backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"

namespace flashmoe {

// Attention of n tokens as tasks: a unit is a KV head with some of the tokens, and goes through the
// keys a block at a time. Few units leave threads idle: then each block of keys is a task as well.
// After every round of such tasks their partial results are merged into one of each unit, so that
// their number does not grow with the context.
struct AttentionDivision {
  AttentionDivision(int n, const AttentionCall& call, int threads);

  int tokens;  // of a unit, at most
  int units, key_blocks;
  bool by_keys;
  int round_blocks;       // of keys, in a round
  int partials;           // of a unit that are held at a time: the merged one, and a round's
  size_t queries;         // of a unit, at most
  size_t partial_floats;  // of an AttentionPartial

  // What it works in: all queries; a thread's scores and partial results; and, where each block of
  // keys is a task, the partial results of a round.
  size_t query_floats, thread_floats, shared_floats;
};

// silu(gate x) * up x of an expert's tokens, or up x, which is as large.
size_t activation_floats(const ExpertCall& call);
// That as 8-bit input of down, where it is quantized.
size_t down_input_bytes(const ExpertCall& call, Precision precision);

// What a forward pass of so many tokens asks of a backend; the pointers are null.
struct PassShape {
  int tokens;
  std::vector<std::pair<int, Matrix>> products;  // tokens, weight
  std::optional<DeltaCall> delta;
  std::optional<AttentionCall> attention;
  std::vector<std::vector<ExpertCall>> experts;  // of each layer, all of them at once
};

// Bytes that the backend has come to work in after such a pass, and after passes of fewer tokens at
// the same position: at most, for experts may land one by one.
int64_t cpu_scratch_bytes(const PassShape& pass, Precision precision, int threads);

}  // namespace flashmoe
