// Routing, experts, and the sum of what they give.
#include <algorithm>
#include <utility>

#include "backend/launch/gpu_backend.h"
#include "backend/launch/helpers.h"

namespace flashmoe {

using namespace shaders;

struct GpuBackend::Batch {
  ExpertArguments arguments{};
  std::vector<const ExpertCall*> calls;
  double seconds = 0;
};

void GpuBackend::route(int n, const RouteCall& call) {
  Plan plan(Kernel::route, {u32(n), 1, 1}, kSimdWidth, seconds_for(0, 4.0 * n * call.experts));
  // An element of x that is infinite or NaN makes the norm of its row NaN somewhere, and with it
  // every logit: these tell of both.
  plan.set(RouteArguments{address(call.logits), address(call.ids), address(call.weights),
                          address(call.finite), u32(call.experts), u32(call.experts_per_token),
                          call.renormalise ? 1u : 0u});
  run(plan);
}

void GpuBackend::combine(int n, const CombineCall& call) {
  const bool norm = call.norm_weight != nullptr;
  Plan plan(Kernel::combine, {u32(n), 1, 1}, kCombineThreads,
            seconds_for(0, 4.0 * n * call.hidden * (call.experts_per_token + 4)));
  plan.set(CombineArguments{.expert_out = address(call.expert_out),
                            .expert_weights = address(call.expert_weights),
                            .shared_out = address(call.shared_out),
                            .shared_gate = address(call.shared_gate),
                            .x = address(call.x),
                            .norm_weight = norm ? address(call.norm_weight) : 0,
                            .normed = norm ? address(call.normed) : 0,
                            .hidden = u32(call.hidden),
                            .experts_per_token = u32(call.experts_per_token),
                            .norm = norm ? 1u : 0u,
                            .eps = call.norm_eps});
  run(plan);
}

void GpuBackend::experts(int, const float* x, std::span<const ExpertCall> calls) {
  waiting_.insert(waiting_.end(), calls.begin(), calls.end());
  waiting_x_ = x;
  if (!overlap_) return;
  launch_waiting();
  commit();
}

void GpuBackend::launch_waiting() {
  const std::vector<ExpertCall> calls = std::exchange(waiting_, {});
  for (auto call = calls.begin(); call != calls.end();) {
    Batch batch;
    while (call != calls.end() && add(batch, *call)) ++call;
    launch_batch(batch);
  }
}

// Takes the expert into the dispatch, or says that it needs another one.
bool GpuBackend::add(Batch& batch, const ExpertCall& call) {
  ExpertArguments& arguments = batch.arguments;
  const double cells = 3.0 * call.gate.rows * call.gate.cols;
  const double bytes = bytes_of(call.gate) + bytes_of(call.up) + bytes_of(call.down);
  const double seconds = seconds_for(2 * cells * static_cast<double>(call.tokens.size()), bytes);
  if (!batch.calls.empty()) {
    const ExpertCall& first = *batch.calls.front();
    if (batch.calls.size() == kMaxExperts || batch.seconds + seconds > tuning_.longest_seconds ||
        !same_format(call.gate, first.gate) || !same_format(call.up, first.up) ||
        !same_format(call.down, first.down)) {
      return false;
    }
  }
  arguments.experts[arguments.count++] = {stored(call.gate), stored(call.up),     stored(call.down),
                                          address(call.out), u32(call.gate.rows), arguments.pairs};
  arguments.hidden = u32(call.gate.cols);
  arguments.pairs += u32(call.tokens.size());
  arguments.stride = std::max(arguments.stride, round_up(call.gate.rows, 4));
  batch.seconds += seconds;
  batch.calls.push_back(&call);
  return true;
}

void GpuBackend::launch_batch(const Batch& batch) {
  ExpertArguments arguments = batch.arguments;
  std::vector<int32_t> tokens, rows;
  uint32_t tiles = 0, widest = 0;
  for (const ExpertCall* call : batch.calls) {
    tokens.insert(tokens.end(), call->tokens.begin(), call->tokens.end());
    rows.insert(rows.end(), call->out_rows.begin(), call->out_rows.end());
    tiles += divide_up(static_cast<int64_t>(call->tokens.size()), kTileTokens);
    widest = std::max(widest, u32(call->gate.rows));
  }
  arguments.x = address(waiting_x_);
  arguments.pair_tokens = stage(tokens);
  arguments.pair_rows = stage(rows);
  arguments.activations =
      scratch(Scratch::kActivations, size_t{arguments.pairs} * arguments.stride * sizeof(float));

  const bool decode = arguments.pairs <= u32(tuning_.decode_tokens) * arguments.count;
  const ExpertCall& first = *batch.calls.front();
  Plan plan(decode ? Kernel::experts_gate_up : Kernel::experts_gate_up_tiles, {1, 1, 1},
            decode ? u32(kMatvecThreads) : u32(kTileThreads), batch.seconds * 2 / 3);
  plan.constants = format_of(first.gate);
  const Constants up = format_of(first.up);
  plan.constants[kSecondBits] = up[kBits];
  plan.constants[kSecondGroup] = up[kGroup];
  plan.constants[kSecondDType] = up[kDType];
  if (decode) plan.constants[kQuads] = quads(int64_t{2} * widest * arguments.pairs);
  const auto grid = [&](uint32_t all_rows, uint32_t decode_rows) -> Plan::Grid {
    return {divide_up(all_rows, decode ? decode_rows : u32(kTileRows)),
            decode ? arguments.pairs : tiles, 1};
  };
  plan.grid = grid(widest, matvec_block_rows(plan.constants[kQuads]) / 2);
  plan.set(arguments);
  launch(plan);

  plan.kernel = decode ? Kernel::experts_down : Kernel::experts_down_tiles;
  plan.constants = format_of(first.down);
  if (decode) plan.constants[kQuads] = quads(int64_t{arguments.hidden} * arguments.pairs);
  plan.grid = grid(arguments.hidden, matvec_block_rows(plan.constants[kQuads]));
  plan.seconds = batch.seconds / 3;
  launch(plan);
}

}  // namespace flashmoe
