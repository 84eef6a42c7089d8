// `_native.GpuPlans`: the plans that a GPU backend launches, as values. For tests and benchmarks,
// which execute them on a CPU or on another GPU. Memory is named by address, an integer.
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "backend/launch/gpu_backend.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Address = uint64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// rows, cols, dtype, bits, group, weight, scales, biases
using PyMatrix = std::tuple<int, int, int, int, int, Address, Address, Address>;

Matrix to_matrix(const PyMatrix& m) {
  return {.rows = std::get<0>(m),
          .cols = std::get<1>(m),
          .dtype = static_cast<DType>(std::get<2>(m)),
          .bits = std::get<3>(m),
          .group = std::get<4>(m),
          .weight = at<const std::byte>(std::get<5>(m)),
          .scales = at<const std::byte>(std::get<6>(m)),
          .biases = at<const std::byte>(std::get<7>(m))};
}

class Recorder final : public GpuBackend {
 public:
  Recorder(nb::callable scratch, nb::callable stage, const Tuning& tuning)
      : GpuBackend(false, tuning), scratch_(std::move(scratch)), stage_(std::move(stage)) {}

  Buffer allocate(Memory, size_t, size_t) override {
    throw std::logic_error("plans have no memory of their own");
  }
  Buffer map(const File&, int64_t, int64_t) override { return nullptr; }
  void finish() override { launch_waiting(); }

  std::vector<Plan> take() {
    finish();
    return std::exchange(plans_, {});
  }

 protected:
  uint64_t address(const void* pointer) override { return reinterpret_cast<uintptr_t>(pointer); }
  uint64_t scratch(Scratch which, size_t bytes) override {
    return nb::cast<uint64_t>(scratch_(static_cast<int>(which), bytes));
  }
  uint64_t stage(std::span<const int32_t> values) override {
    return nb::cast<uint64_t>(stage_(std::vector<int32_t>(values.begin(), values.end())));
  }
  void launch(const Plan& plan) override { plans_.push_back(plan); }
  void commit() override {}

 private:
  nb::callable scratch_, stage_;
  std::vector<Plan> plans_;
};

}  // namespace

void bind_plans(nb::module_& m) {
  nb::class_<Plan>(m, "Plan")
      .def_prop_ro("kernel", [](const Plan& plan) { return name_of(plan.kernel); })
      .def_ro("constants", &Plan::constants)
      .def("__str__", [](const Plan& plan) { return spell(plan.kernel, plan.constants); })
      .def_ro("grid", &Plan::grid)
      .def_ro("threads", &Plan::threads)
      .def_ro("seconds", &Plan::seconds)
      .def_prop_ro("arguments",
                   [](const Plan& plan) { return nb::bytes(plan.arguments.data(), plan.size); });

  nb::class_<Recorder>(m, "GpuPlans")
      .def(
          "__init__",
          [](Recorder* self, nb::callable scratch, nb::callable stage, const nb::dict& tuning) {
            Tuning values;
            const auto set = [&](const char* name, auto& value) {
              if (tuning.contains(name))
                value = nb::cast<std::remove_reference_t<decltype(value)>>(tuning[name]);
            };
            set("decode_tokens", values.decode_tokens);
            set("two_quads_rows", values.two_quads_rows);
            set("least_keys", values.least_keys);
            set("enough_groups", values.enough_groups);
            set("longest_seconds", values.longest_seconds);
            new (self) Recorder(std::move(scratch), std::move(stage), values);
          },
          "scratch"_a, "stage"_a, "tuning"_a = nb::dict())
      .def("take", &Recorder::take)
      .def("embed", [](Recorder& self, const PyMatrix& table, const std::vector<int32_t>& ids,
                       Address out) { self.embed(to_matrix(table), ids, at<float>(out)); })
      .def("rms_norm",
           [](Recorder& self, int n, int width, Address x, Address weight, float eps, Address out) {
             self.rms_norm(n, width, at<float>(x), at<float>(weight), eps, at<float>(out));
           })
      .def("matmul",
           [](Recorder& self, int n, Address x,
              const std::vector<std::tuple<PyMatrix, Address, bool>>& products) {
             std::vector<Matrix> matrices;
             for (const auto& [matrix, out, add] : products) matrices.push_back(to_matrix(matrix));
             std::vector<Product> calls;
             for (size_t i = 0; i < products.size(); ++i) {
               calls.push_back(
                   {&matrices[i], at<float>(std::get<1>(products[i])), std::get<2>(products[i])});
             }
             self.matmul(n, at<float>(x), calls);
           })
      .def("causal_conv",
           [](Recorder& self, int n, int channels, int taps, Address weight, Address state_in,
              Address state_out, Address x) {
             self.causal_conv(n, {.channels = channels,
                                  .kernel = taps,
                                  .weight = at<float>(weight),
                                  .state_in = at<float>(state_in),
                                  .state_out = at<float>(state_out),
                                  .x = at<float>(x)});
           })
      .def("gated_delta",
           [](Recorder& self, int n, std::array<int, 4> shape, float eps,
              std::array<Address, 10> arrays) {
             self.gated_delta(n, {.key_heads = shape[0],
                                  .value_heads = shape[1],
                                  .key_dim = shape[2],
                                  .value_dim = shape[3],
                                  .norm_eps = eps,
                                  .a_log = at<float>(arrays[0]),
                                  .dt_bias = at<float>(arrays[1]),
                                  .norm = at<float>(arrays[2]),
                                  .qkv = at<float>(arrays[3]),
                                  .z = at<float>(arrays[4]),
                                  .a = at<float>(arrays[5]),
                                  .b = at<float>(arrays[6]),
                                  .state_in = at<float>(arrays[7]),
                                  .state_out = at<float>(arrays[8]),
                                  .out = at<float>(arrays[9])});
           })
      .def("attention",
           [](Recorder& self, int n, std::array<int, 4> shape, float theta, float eps,
              int64_t position, int64_t capacity, int dtype, std::array<Address, 8> arrays) {
             self.attention(n, {.heads = shape[0],
                                .kv_heads = shape[1],
                                .head_dim = shape[2],
                                .rotary_dim = shape[3],
                                .rope_theta = theta,
                                .norm_eps = eps,
                                .q_norm = at<float>(arrays[0]),
                                .k_norm = at<float>(arrays[1]),
                                .q_gate = at<float>(arrays[2]),
                                .k = at<float>(arrays[3]),
                                .v = at<float>(arrays[4]),
                                .position = position,
                                .capacity = capacity,
                                .cache_dtype = static_cast<DType>(dtype),
                                .keys = at<std::byte>(arrays[5]),
                                .values = at<std::byte>(arrays[6]),
                                .out = at<float>(arrays[7])});
           })
      .def("route",
           [](Recorder& self, int n, int experts, int experts_per_token, bool renormalise,
              Address logits, Address ids, Address weights, Address finite) {
             self.route(n, {.experts = experts,
                            .experts_per_token = experts_per_token,
                            .renormalise = renormalise,
                            .logits = at<float>(logits),
                            .hidden = 0,
                            .x = nullptr,
                            .ids = at<int32_t>(ids),
                            .weights = at<float>(weights),
                            .finite = at<int32_t>(finite)});
           })
      .def("all_finite",
           [](Recorder& self, int n, int width, Address x, Address finite) {
             self.all_finite(n, width, at<float>(x), at<int32_t>(finite));
           })
      .def("experts",
           [](Recorder& self, int n, Address x,
              const std::vector<std::tuple<std::array<PyMatrix, 3>, std::vector<int32_t>,
                                           std::vector<int32_t>, Address>>& experts) {
             std::vector<ExpertCall> calls;
             for (const auto& [matrices, tokens, out_rows, out] : experts) {
               calls.push_back({to_matrix(matrices[0]), to_matrix(matrices[1]),
                                to_matrix(matrices[2]), tokens, out_rows, at<float>(out)});
             }
             self.experts(n, at<float>(x), calls);
             self.finish();
           })
      .def("combine", [](Recorder& self, int n, int hidden, int experts_per_token,
                         std::array<Address, 7> arrays, float eps) {
        self.combine(n, {.hidden = hidden,
                         .experts_per_token = experts_per_token,
                         .expert_out = at<float>(arrays[0]),
                         .expert_weights = at<float>(arrays[1]),
                         .shared_out = at<float>(arrays[2]),
                         .shared_gate = at<float>(arrays[3]),
                         .x = at<float>(arrays[4]),
                         .norm_weight = at<float>(arrays[5]),
                         .norm_eps = eps,
                         .normed = at<float>(arrays[6])});
      });
}

}  // namespace flashmoe
