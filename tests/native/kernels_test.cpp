// Every operation of the CPU backend by every table of kernels that this machine can run, against
// the portable table on the same random inputs. The tests in Python compare the tables with numpy,
// but only on the machine that builds; this also runs cross-compiled, under an emulator.
//
//     kernels_test [NAME...]     with names, fails unless the tables are portable and those
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels.h"

using namespace flashmoe;

namespace {

uint64_t random_state = 1;

uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1dull) >> 32);
}

// In [-1, 1).
float random_float() {
  return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-31f;
}

std::vector<float> random_floats(size_t count, float scale = 1) {
  std::vector<float> values(count);
  for (float& value : values) value = random_float() * scale;
  return values;
}

std::vector<std::byte> stored(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::F32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else {
      const uint16_t half =
          dtype == DType::BF16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

// A random Matrix and what it points to. bits 0 is dense.
struct Weight {
  Matrix matrix;
  std::vector<std::byte> parts[3];

  Weight(int rows, int cols, DType dtype, int bits = 0, int group = 0) {
    const size_t cells = static_cast<size_t>(rows) * static_cast<size_t>(cols);
    const float scale = 2 / std::sqrt(static_cast<float>(cols));
    if (bits == 0) {
      parts[0] = stored(random_floats(cells, scale), dtype);
    } else {
      const size_t groups = cells / static_cast<size_t>(group);
      const float step = scale / static_cast<float>(1 << (bits - 1));
      parts[0].resize(cells * static_cast<size_t>(bits) / 8);
      for (std::byte& byte : parts[0]) byte = static_cast<std::byte>(random_bits());
      parts[1] = stored(random_floats(groups, step), dtype);
      parts[2] = stored(random_floats(groups, scale), dtype);
    }
    matrix = {rows, cols, dtype, bits, group, parts[0].data(), parts[1].data(), parts[2].data()};
  }
};

// What a case gives: its name, its numbers, and by how much of the largest of them another table
// may differ; 0 where the bits are part of the contract.
struct Result {
  std::string name;
  float tolerance;
  std::vector<float> values;
};

std::vector<Result> compute() {
  random_state = 1;
  std::vector<Result> results;
  const auto add = [&](std::string name, float tolerance, std::vector<float> values) {
    results.push_back({std::move(name), tolerance, std::move(values)});
  };
  const auto exact = make_cpu_backend(Precision::kFloat32, 2);
  const auto fast = make_cpu_backend(Precision::kInt8, 2);
  constexpr DType kDTypes[] = {DType::F32, DType::F16, DType::BF16};
  constexpr int kTokens[] = {1, 3, 4, 13, 35};

  const auto product = [&](const std::string& name, const Weight& weight, bool defined) {
    const Matrix& m = weight.matrix;
    const std::vector<int32_t> ids = {m.rows - 1, 0};
    std::vector<float> rows(2 * static_cast<size_t>(m.cols));
    exact->embed(m, ids, rows.data());
    add("embed " + name, 0, rows);
    for (const int n : kTokens) {
      const std::vector<float> x = random_floats(static_cast<size_t>(n) * m.cols);
      std::vector<float> out = random_floats(static_cast<size_t>(n) * m.rows);
      const std::string tokens = ", " + std::to_string(n) + " tokens";
      if (defined) {  // into what is there already
        const Product sum = {&m, out.data(), true};
        fast->matmul(n, x.data(), {&sum, 1});
        add("int8 product " + name + tokens, 0, out);
      }
      const Product plain = {&m, out.data()};
      exact->matmul(n, x.data(), {&plain, 1});
      add("product " + name + tokens, 1e-5f, out);
    }
  };
  for (const DType dtype : kDTypes) {
    const std::string name = "of dtype " + std::to_string(static_cast<int>(dtype));
    product(name, Weight(5, 33, dtype), false);
    for (const int bits : {2, 4, 8}) {
      for (const int group : {32, 64, 128}) {
        const std::string format =
            name + ", bits " + std::to_string(bits) + ", group " + std::to_string(group);
        product(format, Weight(3, group, dtype, bits, group), true);
        product(format + ", wide", Weight(37, 19 * group, dtype, bits, group), true);
      }
    }
  }

  for (const auto& backend : {std::cref(exact), std::cref(fast)}) {
    const int n = 21, hidden = 192, width = 128;
    const Weight gate(width, hidden, DType::BF16, 4, 64), up(width, hidden, DType::BF16, 8, 32);
    const Weight down(hidden, width, DType::F16, 4, 64);
    const std::vector<float> x = random_floats(static_cast<size_t>(n) * hidden);
    const std::vector<int32_t> tokens = {0, 3, 4, 9, 20}, rows = {4, 3, 2, 1, 0};
    std::vector<float> out(5 * static_cast<size_t>(hidden));
    const ExpertCall call = {gate.matrix, up.matrix, down.matrix, tokens, rows, out.data()};
    backend.get()->experts(n, x.data(), {&call, 1});
    // With 8 bits the last place of silu decides which way an input of `down` is rounded.
    add("experts", &backend.get() == &exact ? 1e-5f : 1e-2f, out);
  }

  for (const int width : {8, 33, 200}) {
    const std::vector<float> x = random_floats(3 * static_cast<size_t>(width)),
                             weight = random_floats(static_cast<size_t>(width));
    std::vector<float> out(x.size());
    exact->rms_norm(3, width, x.data(), weight.data(), 1e-6f, out.data());
    add("rms_norm", 1e-6f, out);
  }

  for (const int channels : {6, 99}) {
    const int n = 7, kernel = 4;
    const size_t width = static_cast<size_t>(channels);
    std::vector<float> x = random_floats(n * width, 4), weight = random_floats(kernel * width),
                       state = random_floats((kernel - 1) * width), after(state.size());
    exact->causal_conv(n, {channels, kernel, weight.data(), state.data(), after.data(), x.data()});
    add("causal_conv", 1e-6f, x);
    add("causal_conv's state", 0, after);
  }

  for (const auto& [key_heads, heads, keys, values] :
       {std::array{2, 4, 16, 24}, std::array{1, 1, 33, 40}}) {
    const size_t n = 19, key_width = static_cast<size_t>(key_heads * keys),
                 width = static_cast<size_t>(heads * values), count = static_cast<size_t>(heads);
    const auto a_log = random_floats(count), dt_bias = random_floats(count),
               norm = random_floats(static_cast<size_t>(values)),
               qkv = random_floats(n * (2 * key_width + width)), z = random_floats(n * width, 4),
               a = random_floats(n * count, 4), b = random_floats(n * count, 4),
               state = random_floats(width * static_cast<size_t>(keys));
    std::vector<float> after(state.size()), out(n * width);
    exact->gated_delta(static_cast<int>(n), {.key_heads = key_heads,
                                             .value_heads = heads,
                                             .key_dim = keys,
                                             .value_dim = values,
                                             .norm_eps = 1e-6f,
                                             .a_log = a_log.data(),
                                             .dt_bias = dt_bias.data(),
                                             .norm = norm.data(),
                                             .qkv = qkv.data(),
                                             .z = z.data(),
                                             .a = a.data(),
                                             .b = b.data(),
                                             .state_in = state.data(),
                                             .state_out = after.data(),
                                             .out = out.data()});
    add("gated_delta", 2e-5f, out);
    add("gated_delta's state", 1e-5f, after);
  }

  for (const auto& [n, heads, kv_heads, dim, position] :
       {std::array{5, 4, 2, 24, 0}, std::array{9, 6, 1, 40, 510}}) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      const size_t tokens = static_cast<size_t>(n), width = static_cast<size_t>(dim),
                   capacity = tokens + static_cast<size_t>(position);
      const auto q_norm = random_floats(width, 2), k_norm = random_floats(width, 2),
                 q_gate = random_floats(tokens * static_cast<size_t>(heads) * 2 * width),
                 k = random_floats(tokens * static_cast<size_t>(kv_heads) * width),
                 v = random_floats(tokens * static_cast<size_t>(kv_heads) * width);
      const size_t cells = static_cast<size_t>(kv_heads) * capacity * width;
      auto keys = stored(random_floats(cells, 2), dtype),
           values = stored(random_floats(cells), dtype);
      std::vector<float> out(tokens * static_cast<size_t>(heads) * width);
      exact->attention(n, {.heads = heads,
                           .kv_heads = kv_heads,
                           .head_dim = dim,
                           .rotary_dim = 8,
                           .rope_theta = 1e6f,
                           .norm_eps = 1e-6f,
                           .q_norm = q_norm.data(),
                           .k_norm = k_norm.data(),
                           .q_gate = q_gate.data(),
                           .k = k.data(),
                           .v = v.data(),
                           .position = position,
                           .capacity = static_cast<int64_t>(capacity),
                           .cache_dtype = dtype,
                           .keys = keys.data(),
                           .values = values.data(),
                           .out = out.data()});
      // A key may fall on the other side of a bfloat16 rounding; some tables round more.
      add("attention", dtype == DType::F32 ? 2e-5f : 1e-2f, out);
    }
  }

  const int n = 3, hidden = 101, experts_per_token = 3;
  const auto expert_out = random_floats(n * experts_per_token * hidden),
             weights = random_floats(n * experts_per_token), shared = random_floats(n * hidden),
             gate = random_floats(n, 4);
  std::vector<float> x = random_floats(n * hidden);
  exact->combine(n, {hidden, experts_per_token, expert_out.data(), weights.data(), shared.data(),
                     gate.data(), x.data()});
  add("combine", 1e-6f, x);
  return results;
}

// Whether `actual` is what is expected of it; says why not.
bool agrees(const char* table, const Result& actual, const Result& expected) {
  float largest = 0, error = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    largest = std::fmax(largest, std::fabs(expected.values[i]));
    const float difference = std::fabs(actual.values[i] - expected.values[i]);
    if (!(difference <= error)) error = difference;  // NaN too
  }
  if (error <= actual.tolerance * largest) return true;
  std::printf("%s: %s: differs by %g of at most %g\n", table, actual.name.c_str(),
              static_cast<double>(error), static_cast<double>(largest));
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  std::string expected = "portable", found;
  for (int i = 1; i < count; ++i) expected.append(" ").append(arguments[i]);
  for (const Kernels* kernels : available_kernels()) {
    found.append(found.empty() ? "" : " ").append(kernels->name);
  }
  if (count > 1 && found != expected) {
    std::printf("tables: %s; expected: %s\n", found.c_str(), expected.c_str());
    return 1;
  }
  int failures = 0;
  std::vector<Result> portable;
  for (const Kernels* kernels : available_kernels()) {
    setenv("FLASHMOE_ISA", kernels->name, 1);
    std::vector<Result> results = compute();
    if (portable.empty()) portable = results;
    for (size_t i = 0; i < results.size(); ++i) {
      failures += !agrees(kernels->name, results[i], portable[i]);
    }
    std::printf("%s: %zu cases\n", kernels->name, results.size());
  }
  return failures != 0;
}
