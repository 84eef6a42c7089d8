// The CPU backend: divides each operation into tasks for the thread pool and hands these to the
// kernels. A task writes a part of the output that is its own.
#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "backend/cpu/int8_inputs.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/scratch.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace flashmoe {
namespace {

constexpr int kRowUnit = 32;    // rows of a task are a multiple of it: what kernels take
constexpr int kFewRowUnit = 8;  // with a few tokens, which they take row by row
constexpr int kFewTokens = 3;
constexpr int kTaskTokens = 64;       // of a task, at most: more tasks, alike for every expert
constexpr int kTasksPerThread = 32;   // enough that threads of unequal speed end together
constexpr int64_t kMinCells = 32768;  // weight elements times tokens that are worth a task
constexpr int kSmall = 16384;  // floats of an elementwise operation not worth a second thread

int divide_up(int64_t value, int64_t unit) {
  return static_cast<int>((value + unit - 1) / unit);
}
int round_up(int64_t value, int unit) {
  return divide_up(value, unit) * unit;
}

int32_t is_finite(const float* values, int count) {
  int finite = 1;
  for (int i = 0; i < count; ++i) finite &= std::isfinite(values[i]);
  return finite;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(Precision precision, int threads)
      : kernels_(select_kernels()),
        precision_(precision),
        int8_(precision == Precision::kInt8),
        pool_(threads),
        inputs_(kernels_),
        per_thread_(static_cast<size_t>(pool_.threads())) {}

  Buffer allocate(Memory, size_t bytes, size_t) override { return allocate_pages(bytes); }
  Buffer map(const File&, int64_t, int64_t) override { return nullptr; }
  void finish() override {}
  double busy_seconds() const override { return pool_.busy_seconds(); }
  void stop() override { pool_.stop(); }

  int64_t scratch_bytes() const override {
    int64_t total = inputs_.bytes();
    for (const Scratch* scratch : {&queries_, &partials_, &activations_, &down_memory_}) {
      total += scratch->bytes();
    }
    for (const Scratch& scratch : per_thread_) total += scratch.bytes();
    return total;
  }

  void embed(const Matrix& table, std::span<const int32_t> ids, float* out) override {
    for_each(static_cast<int>(ids.size()), table.cols,
             [&](int t) { kernels_.expand_row(table, ids[t], out + int64_t{t} * table.cols); });
  }

  void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                float* out) override {
    for_each(n, width, [&](int t) {
      kernels_.rms_norm(width, x + int64_t{t} * width, weight, eps, out + int64_t{t} * width);
    });
  }

  void matmul(int n, const float* x, std::span<const Product> products) override {
    if (n == 0 || products.empty()) return;
    const int cols = products[0].weight->cols;
    if (int8_) {
      inputs_.begin(n, cols);
      for (const Product& product : products) inputs_.want(*product.weight);
      for_each(n, cols, [&](int t) { inputs_.quantize(x + int64_t{t} * cols, t); });
    }
    int64_t rows = 0;
    for (const Product& product : products) rows += product.weight->rows;
    const int step = task_rows(rows, int64_t{cols} * n, n);
    const int blocks = divide_up(n, kTaskTokens);
    const int32_t* every = every_token(n);
    ends_.clear();
    for (const Product& product : products) {
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) +
                      divide_up(product.weight->rows, step) * blocks);
    }
    pool_.parallel_for(
        ends_.back(),
        [&](int task, int) {
          const auto [index, part] = find_part(task);
          const Product& product = products[index];
          const int begin = part / blocks * step;
          const int end = std::min(begin + step, product.weight->rows);
          const int token = part % blocks * kTaskTokens;
          multiply({product.weight, begin, end, std::min(n - token, kTaskTokens), every + token,
                    every + token, product.out, product.weight->rows, product.add},
                   x);
        },
        ThreadPool::Tasks::kAlike);
  }

  void causal_conv(int n, const ConvCall& call) override {
    if (call.kernel > kMaxConvKernel) {
      throw std::invalid_argument("convolution kernel of " + std::to_string(call.kernel) +
                                  " taps; at most " + std::to_string(kMaxConvKernel));
    }
    const int step = std::max(64, round_up(kSmall / (call.kernel * n), 16));
    pool_.parallel_for(divide_up(call.channels, step), [&](int task, int) {
      kernels_.causal_conv(n, call, task * step, std::min((task + 1) * step, call.channels));
    });
  }

  void gated_delta(int n, const DeltaCall& call) override {
    const size_t floats = delta_scratch(call);
    pool_.parallel_for(call.value_heads, [&](int head, int thread) {
      kernels_.gated_delta(n, call, head, per_thread_[thread].get<float>(floats));
    });
  }

  void attention(int n, const AttentionCall& call) override;
  void route(int n, const RouteCall& call) override;
  void all_finite(int n, int width, const float* x, int32_t* finite) override {
    for_each(n, width, [&](int t) { finite[t] = is_finite(x + int64_t{t} * width, width); });
  }
  void experts(int n, const float* x, std::span<const ExpertCall> calls) override;

  void combine(int n, const CombineCall& call) override {
    for_each(n, call.hidden, [&](int t) {
      kernels_.combine(call, t, 0, call.hidden);
      if (call.norm_weight == nullptr) return;
      const int64_t row = int64_t{t} * call.hidden;
      kernels_.rms_norm(call.hidden, call.x + row, call.norm_weight, call.norm_eps,
                        call.normed + row);
    });
  }

 private:
  // body(t) for t in [0, n), each about `width` floats of work, several to a task.
  template <class Body>
  void for_each(int n, int width, const Body& body) {
    const int step = std::max(1, kSmall / std::max(1, width));
    pool_.parallel_for(divide_up(n, step), [&](int task, int) {
      for (int t = task * step; t < std::min(n, (task + 1) * step); ++t) body(t);
    });
  }

  // 0, 1, 2 and so on.
  const int32_t* every_token(int n) {
    while (static_cast<int>(every_.size()) < n) every_.push_back(static_cast<int>(every_.size()));
    return every_.data();
  }

  // Of tasks that belong to one thing after another, each up to its end in ends_: which a task
  // belongs to, and which of its tasks it is.
  std::pair<size_t, int> find_part(int task) const {
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), task);
    return {static_cast<size_t>(end - ends_.begin()),
            end == ends_.begin() ? task : task - *std::prev(end)};
  }

  // Rows of a task when `rows` rows are multiplied, `cells` weight elements times tokens each, with
  // at most n tokens.
  int task_rows(int64_t rows, int64_t cells, int n) const {
    const int64_t even = divide_up(rows, int64_t{kTasksPerThread} * pool_.threads());
    const int64_t least = kMinCells / std::max<int64_t>(1, cells) + 1;
    return round_up(std::max(even, least), n > kFewTokens ? kRowUnit : kFewRowUnit);
  }

  void multiply(const Rows& rows, const float* x) const {
    if (int8_ && rows.weight->bits) {
      kernels_.matmul_int8(rows, inputs_.get(*rows.weight));
    } else {
      kernels_.matmul_float(rows, x);
    }
  }

  const Kernels& kernels_;
  const Precision precision_;
  const bool int8_;
  ThreadPool pool_;
  Int8Inputs inputs_;
  std::vector<Scratch> per_thread_;
  Scratch queries_, partials_, activations_;
  std::vector<Int8Input> down_inputs_;
  std::vector<size_t> offsets_;
  std::vector<int> ends_;
  std::vector<int32_t> every_;
  Scratch down_memory_;
};

void CpuBackend::attention(int n, const AttentionCall& call) {
  const int width = padded(call.head_dim), group = call.heads / call.kv_heads;
  const AttentionDivision division(n, call, pool_.threads());
  const int tokens = division.tokens, units = division.units, key_blocks = division.key_blocks;
  const size_t queries = division.queries, partial_floats = division.partial_floats;
  float* q = queries_.get<float>(division.query_floats);
  for_each(n, (call.heads + call.kv_heads) * width, [&](int t) {
    std::vector<float> scratch(2 * static_cast<size_t>(width));
    kernels_.attention_append(call, t, q, scratch.data());
  });

  const auto partial_at = [&](float* memory) {
    return AttentionPartial{memory, memory + queries, memory + 2 * queries};
  };
  const auto unit_block = [&](int unit) {
    const int first = unit / call.kv_heads * tokens;
    return AttentionBlock{unit % call.kv_heads, first, std::min(first + tokens, n), 0, 0};
  };
  // Narrows `block` to the key block; says whether any of its tokens sees it.
  const auto select_keys = [&](AttentionBlock& block, int key_block) {
    block.begin = int64_t{key_block} * kKeyBlock;
    block.end = std::min(block.begin + kKeyBlock, call.position + block.last);
    return block.begin < block.end;
  };
  const auto merge = [&](const AttentionBlock& block, const AttentionPartial& into,
                         const AttentionPartial& from) {
    kernels_.attention_merge((block.last - block.first) * group, call.head_dim, into, from);
  };

  if (!division.by_keys) {
    pool_.parallel_for(units, [&](int unit, int thread) {
      AttentionBlock block = unit_block(unit);
      float* memory = per_thread_[thread].get<float>(division.thread_floats);
      const AttentionPartial total = partial_at(memory), part = partial_at(memory + partial_floats);
      for (int key_block = 0; key_block < key_blocks && select_keys(block, key_block);
           ++key_block) {
        const AttentionPartial& out = key_block == 0 ? total : part;
        kernels_.attention_block(call, block, q, out, memory + 2 * partial_floats);
        if (key_block > 0) merge(block, total, part);
      }
      kernels_.attention_finish(call, block, total);
    });
    return;
  }

  float* partials = partials_.get<float>(division.shared_floats);
  // A unit's first partial result becomes its total; those of a round lie behind it.
  const auto partial_of = [&](int unit, int key_block) {
    const int index = key_block == 0 ? 0 : 1 + (key_block - 1) % division.round_blocks;
    return partial_at(partials +
                      partial_floats * (static_cast<size_t>(unit) * division.partials + index));
  };
  for (int begin = 0, end; begin < key_blocks; begin = end) {
    end = std::min(begin == 0 ? division.partials : begin + division.round_blocks, key_blocks);
    pool_.parallel_for(units * (end - begin), [&](int task, int thread) {
      const int unit = task / (end - begin), key_block = begin + task % (end - begin);
      AttentionBlock block = unit_block(unit);
      if (!select_keys(block, key_block)) return;
      kernels_.attention_block(call, block, q, partial_of(unit, key_block),
                               per_thread_[thread].get<float>(division.thread_floats));
    });
    pool_.parallel_for(units, [&](int unit, int) {
      AttentionBlock block = unit_block(unit);
      const AttentionPartial total = partial_of(unit, 0);
      for (int key_block = std::max(begin, 1); key_block < end && select_keys(block, key_block);
           ++key_block) {
        merge(block, total, partial_of(unit, key_block));
      }
      if (end == key_blocks) kernels_.attention_finish(call, block, total);
    });
  }
}

void CpuBackend::route(int n, const RouteCall& call) {
  const int experts = call.experts, experts_per_token = call.experts_per_token;
  for_each(n, experts + call.hidden, [&](int t) {
    const float* logit = call.logits + int64_t{t} * experts;
    int32_t* chosen = call.ids + int64_t{t} * experts_per_token;
    float* weight = call.weights + int64_t{t} * experts_per_token;
    call.finite[t] =
        is_finite(logit, experts) & is_finite(call.x + int64_t{t} * call.hidden, call.hidden);
    int found = 0;  // chosen[0 .. found) holds the largest so far, in falling order
    for (int32_t e = 0; e < experts; ++e) {
      const bool full = found == experts_per_token;
      if (full && !(logit[e] > logit[chosen[found - 1]])) continue;
      int at = full ? found - 1 : found++;
      for (; at > 0 && logit[e] > logit[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
      chosen[at] = e;
    }
    // The softmax's own sum cancels where the weights are divided by theirs.
    const float top = logit[chosen[0]];
    float total = 0;
    for (int j = 0; j < experts_per_token; ++j) {
      total += weight[j] = std::exp(logit[chosen[j]] - top);
    }
    if (!call.renormalise) {
      total = 0;
      for (int e = 0; e < experts; ++e) total += std::exp(logit[e] - top);
    }
    for (int j = 0; j < experts_per_token; ++j) weight[j] /= total;
  });
}

void CpuBackend::experts(int n, const float* x, std::span<const ExpertCall> calls) {
  // Rows of gate and up of a task: whole groups of the input of down, which the task quantizes.
  const auto unit = [](const ExpertCall& call) { return std::max(64, call.down.group); };
  const auto token_blocks = [](const ExpertCall& call) {
    return divide_up(static_cast<int64_t>(call.tokens.size()), kTaskTokens);
  };
  if (calls.empty()) return;
  const int cols = calls[0].gate.cols;
  const auto quantized = [&](const Matrix& weight) { return int8_ && weight.bits != 0; };

  if (int8_) {
    inputs_.begin(n, cols);
    for (const ExpertCall& call : calls) {
      inputs_.want(call.gate);
      inputs_.want(call.up);
      inputs_.need(call.tokens);
    }
    const std::span<const int32_t> needed = inputs_.needed();
    for_each(static_cast<int>(needed.size()), cols,
             [&](int i) { inputs_.quantize(x + int64_t{needed[i]} * cols, needed[i]); });
  }

  // Every call's silu(gate x) * up x, [tokens, intermediate], and up x beside it.
  offsets_.clear();
  ends_.clear();
  down_inputs_.clear();
  size_t floats = 0, bytes = 0;
  int first_tasks = 0, second_rows = 0;
  int64_t cells = 0;
  for (const ExpertCall& call : calls) {
    offsets_.push_back(floats);
    floats += activation_floats(call);
    first_tasks += divide_up(call.gate.rows, unit(call)) * token_blocks(call);
    ends_.push_back(first_tasks);
    second_rows = std::max(second_rows, call.down.rows);
    cells += int64_t{call.down.cols} * static_cast<int64_t>(call.tokens.size());
    bytes += down_input_bytes(call, precision_);
  }
  float* gates = activations_.get<float>(2 * floats);
  float* ups = gates + floats;
  std::byte* memory = down_memory_.get<std::byte>(bytes);
  for (const ExpertCall& call : calls) {
    const int tokens = static_cast<int>(call.tokens.size());
    down_inputs_.push_back({});
    if (!quantized(call.down)) continue;
    down_inputs_.back() = make_int8_input(call.down, tokens, memory);
    memory += down_input_bytes(call, precision_);
  }

  pool_.parallel_for(first_tasks, [&](int task, int) {
    const auto [index, part] = find_part(task);
    const ExpertCall& call = calls[index];
    const int blocks = token_blocks(call), width = call.gate.rows;
    const int begin = part / blocks * unit(call), end = std::min(begin + unit(call), width);
    const int first = part % blocks * kTaskTokens;
    const int tokens = std::min(static_cast<int>(call.tokens.size()) - first, kTaskTokens);
    float* gate = gates + offsets_[index] + int64_t{first} * width;
    float* up = ups + offsets_[index] + int64_t{first} * width;
    const int32_t* inputs = call.tokens.data() + first;
    multiply({&call.gate, begin, end, tokens, inputs, nullptr, gate, width, false}, x);
    multiply({&call.up, begin, end, tokens, inputs, nullptr, up, width, false}, x);
    for (int t = 0; t < tokens; ++t) {
      float* row = gate + int64_t{t} * width;
      kernels_.swiglu(end - begin, row + begin, up + int64_t{t} * width + begin);
      if (quantized(call.down)) {
        const int group = call.down.group;
        kernels_.quantize(row, first + t, begin / group, end / group, down_inputs_[index]);
      }
    }
  });

  int most = 0;
  for (const ExpertCall& call : calls) most = std::max(most, static_cast<int>(call.tokens.size()));
  const auto count = static_cast<int64_t>(calls.size());
  const int step = task_rows(second_rows * count, cells / count, most);
  ends_.clear();
  for (const ExpertCall& call : calls) {
    ends_.push_back((ends_.empty() ? 0 : ends_.back()) +
                    divide_up(call.down.rows, step) * token_blocks(call));
  }
  const int32_t* every = every_token(most);
  pool_.parallel_for(ends_.back(), [&](int task, int) {
    const auto [index, part] = find_part(task);
    const ExpertCall& call = calls[index];
    const int blocks = token_blocks(call);
    const int begin = part / blocks * step, end = std::min(begin + step, call.down.rows);
    const int first = part % blocks * kTaskTokens;
    const int tokens = std::min(static_cast<int>(call.tokens.size()) - first, kTaskTokens);
    const Rows rows = {&call.down, begin,          end,
                       tokens,     every + first,  call.out_rows.data() + first,
                       call.out,   call.down.rows, false};
    if (quantized(call.down)) {
      kernels_.matmul_int8(rows, down_inputs_[index]);
    } else {
      kernels_.matmul_float(rows, gates + offsets_[index]);
    }
  });
}

}  // namespace

Precision parse_precision(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "int8") return Precision::kInt8;
  throw std::invalid_argument("precision must be \"float32\" or \"int8\", not \"" + name + "\"");
}

std::unique_ptr<Backend> make_cpu_backend(Precision precision, int threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, not " + std::to_string(threads));
  }
  return std::make_unique<CpuBackend>(precision, threads);
}

}  // namespace flashmoe
