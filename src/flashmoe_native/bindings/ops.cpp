// `_native.ops`: a Backend's operations on numpy arrays, for tests, benchmarks and `flashmoe
// doctor`; the engine does not pass here.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/kernels.h"
#include "bindings/bindings.h"
#include "model/engine.h"

namespace nb = nanobind;

namespace flashmoe {
namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using InOut = nb::ndarray<nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<nb::numpy, T>;

template <class T>
Out<T> make(std::vector<size_t> shape) {
  size_t count = 1;
  for (size_t extent : shape) count *= extent;
  auto data = std::make_unique<T[]>(std::max<size_t>(count, 1));
  nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Out<T>(data.release(), shape.size(), shape.data(), owner);
}

template <class Array>
void expect(const Array& array, const char* name, std::vector<int64_t> shape) {
  bool same = array.ndim() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = static_cast<int64_t>(array.shape(i)) == shape[i];
  }
  if (same) return;
  std::string expected, found;
  for (int64_t extent : shape) expected += " " + std::to_string(extent);
  for (size_t i = 0; i < array.ndim(); ++i) found += " " + std::to_string(array.shape(i));
  throw std::invalid_argument(std::string(name) + ": expected shape [" + expected + " ], found [" +
                              found + " ]");
}

template <class Array>
int extent(const Array& array, const char* name, size_t axis, size_t dimensions) {
  if (array.ndim() != dimensions) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(dimensions) +
                                " dimensions, found " + std::to_string(array.ndim()));
  }
  return static_cast<int>(array.shape(axis));
}

// A Matrix that keeps its arrays alive, or has copies of them in memory of a backend's.
struct OwnedMatrix {
  Matrix matrix;
  std::vector<Bytes> parts;
  std::vector<Buffer> buffers;

  OwnedMatrix(OwnedMatrix&&) = default;
  OwnedMatrix(const OwnedMatrix& other, Backend& backend) : matrix(other.matrix) {
    const std::byte** into[] = {&matrix.weight, &matrix.scales, &matrix.biases};
    for (size_t i = 0; i < other.parts.size(); ++i) {
      buffers.push_back(backend.allocate(Memory::kWeights, other.parts[i].nbytes()));
      std::memcpy(buffers.back().get(), other.parts[i].data(), other.parts[i].nbytes());
      *into[i] = buffers.back().get();
    }
  }

  OwnedMatrix(int rows, int cols, const std::string& dtype, std::vector<Bytes> arrays, int bits,
              int group)
      : parts(std::move(arrays)) {
    const Format format{rows, cols, parse_dtype(dtype), bits, group};
    if (bits == 0 ? group != 0 : bits != 2 && bits != 4 && bits != 8) {
      throw std::invalid_argument("bits must be 2, 4, 8, or 0 with group 0 for a dense matrix");
    }
    if (bits != 0 && ((group != 32 && group != 64 && group != 128) || cols % group != 0)) {
      throw std::invalid_argument("group must be 32, 64 or 128 and divide the columns");
    }
    if (static_cast<int>(parts.size()) != format.parts()) {
      throw std::invalid_argument("expected " + std::to_string(format.parts()) + " parts, found " +
                                  std::to_string(parts.size()));
    }
    const std::byte* pointers[3] = {};
    for (int i = 0; i < format.parts(); ++i) {
      if (static_cast<int64_t>(parts[i].nbytes()) != format.part_bytes(i)) {
        throw std::invalid_argument("part " + std::to_string(i) + ": expected " +
                                    std::to_string(format.part_bytes(i)) + " bytes, found " +
                                    std::to_string(parts[i].nbytes()));
      }
      pointers[i] = static_cast<const std::byte*>(parts[i].data());
    }
    matrix = make_matrix(format, pointers);
  }
};

using ExpertTuple = std::tuple<const OwnedMatrix*, const OwnedMatrix*, const OwnedMatrix*,
                               In<int32_t>, In<int32_t>>;

// A call's arrays where a backend computes: as they are where that is the host's memory, else
// copies in memory of its own, which done() brings back.
class Arrays {
 public:
  Arrays(Backend& backend, bool copied) : backend_(backend), copied_(copied) {}

  template <class T>
  const T* in(const In<T>& array) {
    return copied_ ? static_cast<const T*>(copy(array.data(), array.nbytes())) : array.data();
  }

  // What the operation may also read, and writes.
  template <class Array>
  auto* out(const Array& array) {
    auto* data = array.data();
    if (!copied_) return data;
    auto* copied = static_cast<decltype(data)>(copy(data, array.nbytes()));
    back_.push_back({data, copied, array.nbytes()});
    return copied;
  }

  void done() {
    backend_.finish();
    for (const Back& back : back_) std::memcpy(back.to, back.from, back.nbytes);
  }

 private:
  struct Back {
    void* to;
    const void* from;
    size_t nbytes;
  };

  void* copy(const void* data, size_t nbytes) {
    buffers_.push_back(backend_.allocate(Memory::kExchange, nbytes));
    return std::memcpy(buffers_.back().get(), data, nbytes);
  }

  Backend& backend_;
  const bool copied_;
  std::vector<Buffer> buffers_;
  std::vector<Back> back_;
};

class Ops {
 public:
  Ops(const std::string& precision, int threads, const std::string& backend,
      const std::string& kernels)
      : backend_(make_backend(
            {.backend = backend, .precision = precision, .threads = threads, .kernels = kernels})),
        copied_(backend != "cpu") {}

  // A matrix where this backend computes with it.
  OwnedMatrix place(const OwnedMatrix& matrix) const { return {matrix, *backend_}; }

  nb::dict times() const {
    const DeviceTimes times = backend_->times();
    nb::dict result;
    result["committed"] = times.committed;
    result["began"] = times.began;
    result["ended"] = times.ended;
    result["woken"] = times.woken;
    return result;
  }

  std::vector<std::string> compiled() const { return backend_->compiled(); }

  nb::dict describe() const {
    nb::dict result;
    for (const auto& [name, value] : backend_->describe()) result[name.c_str()] = value;
    return result;
  }

  Out<float> embed(const OwnedMatrix& table, In<int32_t> ids) {
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids.data()[i] < 0 || ids.data()[i] >= table.matrix.rows) {
        throw std::invalid_argument("id " + std::to_string(ids.data()[i]) + " is not a row");
      }
    }
    auto out = make<float>({ids.size(), static_cast<size_t>(table.matrix.cols)});
    Arrays at(*backend_, copied_);
    backend_->embed(table.matrix, {ids.data(), ids.size()}, at.out(out));
    at.done();
    return out;
  }

  Out<float> rms_norm(In<float> x, In<float> weight, float eps) {
    const int n = extent(x, "x", 0, 2), width = extent(x, "x", 1, 2);
    expect(weight, "weight", {width});
    auto out = make<float>({x.shape(0), x.shape(1)});
    Arrays at(*backend_, copied_);
    backend_->rms_norm(n, width, at.in(x), at.in(weight), eps, at.out(out));
    at.done();
    return out;
  }

  nb::list matmul(In<float> x, const std::vector<const OwnedMatrix*>& weights) {
    std::vector<Out<float>> outs;
    const int n = extent(x, "x", 0, 2);
    for (const OwnedMatrix* weight : weights) {
      outs.push_back(make<float>({x.shape(0), static_cast<size_t>(weight->matrix.rows)}));
    }
    multiply(n, x, weights, outs, false);
    nb::list list;
    for (Out<float>& out : outs) list.append(std::move(out));
    return list;
  }

  void matmul_add(In<float> x, const OwnedMatrix& weight, Out<float> out) {
    const int n = extent(x, "x", 0, 2);
    expect(out, "out", {n, weight.matrix.rows});
    multiply(n, x, {&weight}, {out}, true);
  }

  std::pair<Out<float>, Out<float>> causal_conv(In<float> x, In<float> weight, In<float> state) {
    const int n = extent(x, "x", 0, 2), channels = extent(x, "x", 1, 2);
    const int kernel = extent(weight, "weight", 0, 2);
    expect(weight, "weight", {kernel, channels});
    expect(state, "state", {kernel - 1, channels});
    auto out = make<float>({x.shape(0), x.shape(1)});
    auto next = make<float>({state.shape(0), state.shape(1)});
    std::copy_n(x.data(), x.size(), out.data());
    Arrays at(*backend_, copied_);
    backend_->causal_conv(n, {.channels = channels,
                              .kernel = kernel,
                              .weight = at.in(weight),
                              .state_in = at.in(state),
                              .state_out = at.out(next),
                              .x = at.out(out)});
    at.done();
    return {out, next};
  }

  std::pair<Out<float>, Out<float>> gated_delta(In<float> qkv, In<float> z, In<float> a,
                                                In<float> b, In<float> a_log, In<float> dt_bias,
                                                In<float> norm, In<float> state, int key_heads,
                                                float eps) {
    const int n = extent(qkv, "qkv", 0, 2), heads = extent(state, "state", 0, 3);
    const int key_dim = extent(state, "state", 1, 3), value_dim = extent(state, "state", 2, 3);
    if (key_heads < 1 || heads % key_heads != 0) {
      throw std::invalid_argument("key_heads must divide the value heads");
    }
    expect(qkv, "qkv", {n, 2 * key_heads * key_dim + heads * value_dim});
    expect(z, "z", {n, heads * value_dim});
    expect(a, "a", {n, heads});
    expect(b, "b", {n, heads});
    expect(a_log, "a_log", {heads});
    expect(dt_bias, "dt_bias", {heads});
    expect(norm, "norm", {value_dim});
    auto out = make<float>({z.shape(0), z.shape(1)});
    auto next = make<float>({state.shape(0), state.shape(1), state.shape(2)});
    Arrays at(*backend_, copied_);
    backend_->gated_delta(n, {.key_heads = key_heads,
                              .value_heads = heads,
                              .key_dim = key_dim,
                              .value_dim = value_dim,
                              .norm_eps = eps,
                              .a_log = at.in(a_log),
                              .dt_bias = at.in(dt_bias),
                              .norm = at.in(norm),
                              .qkv = at.in(qkv),
                              .z = at.in(z),
                              .a = at.in(a),
                              .b = at.in(b),
                              .state_in = at.in(state),
                              .state_out = at.out(next),
                              .out = at.out(out)});
    at.done();
    return {out, next};
  }

  // keys and values, float32 or uint16 holding bfloat16, are appended to in place.
  Out<float> attention(In<float> q_gate, In<float> k, In<float> v, In<float> q_norm,
                       In<float> k_norm, InOut keys, InOut values, int64_t position, int rotary_dim,
                       float rope_theta, float eps) {
    const int n = extent(q_gate, "q_gate", 0, 3), heads = extent(q_gate, "q_gate", 1, 3);
    const int dim = extent(k, "k", 2, 3), kv_heads = extent(k, "k", 1, 3);
    const int64_t capacity = extent(keys, "keys", 1, 3);
    expect(q_gate, "q_gate", {n, heads, 2 * dim});
    expect(k, "k", {n, kv_heads, dim});
    expect(v, "v", {n, kv_heads, dim});
    expect(q_norm, "q_norm", {dim});
    expect(k_norm, "k_norm", {dim});
    expect(keys, "keys", {kv_heads, capacity, dim});
    expect(values, "values", {kv_heads, capacity, dim});
    if (heads % kv_heads != 0 || position < 0 || position + n > capacity || rotary_dim > dim) {
      throw std::invalid_argument(
          "kv_heads must divide heads, position + n not exceed the capacity, nor rotary_dim "
          "head_dim");
    }
    const bool half = keys.dtype() == nb::dtype<uint16_t>();
    if (keys.dtype() != values.dtype() || (!half && keys.dtype() != nb::dtype<float>())) {
      throw std::invalid_argument("keys and values must both be float32 or uint16 (bfloat16)");
    }
    auto out = make<float>({q_gate.shape(0), static_cast<size_t>(heads) * k.shape(2)});
    Arrays at(*backend_, copied_);
    backend_->attention(n, {.heads = heads,
                            .kv_heads = kv_heads,
                            .head_dim = dim,
                            .rotary_dim = rotary_dim,
                            .rope_theta = rope_theta,
                            .norm_eps = eps,
                            .q_norm = at.in(q_norm),
                            .k_norm = at.in(k_norm),
                            .q_gate = at.in(q_gate),
                            .k = at.in(k),
                            .v = at.in(v),
                            .position = position,
                            .capacity = capacity,
                            .cache_dtype = half ? DType::BF16 : DType::F32,
                            .keys = static_cast<std::byte*>(at.out(keys)),
                            .values = static_cast<std::byte*>(at.out(values)),
                            .out = at.out(out)});
    at.done();
    return out;
  }

  std::pair<Out<int32_t>, Out<float>> route(In<float> logits, int experts_per_token,
                                            bool renormalise) {
    const int n = extent(logits, "logits", 0, 2), experts = extent(logits, "logits", 1, 2);
    if (experts_per_token < 1 || experts_per_token > experts) {
      throw std::invalid_argument("experts_per_token must be between 1 and the number of experts");
    }
    auto ids = make<int32_t>({logits.shape(0), static_cast<size_t>(experts_per_token)});
    auto weights = make<float>({logits.shape(0), static_cast<size_t>(experts_per_token)});
    auto finite = make<int32_t>({logits.shape(0)});
    Arrays at(*backend_, copied_);
    backend_->route(n, {.experts = experts,
                        .experts_per_token = experts_per_token,
                        .renormalise = renormalise,
                        .logits = at.in(logits),
                        .hidden = 0,
                        .x = at.in(logits),
                        .ids = at.out(ids),
                        .weights = at.out(weights),
                        .finite = at.out(finite)});
    at.done();
    return {ids, weights};
  }

  Out<int32_t> all_finite(In<float> x) {
    const int n = extent(x, "x", 0, 2), width = extent(x, "x", 1, 2);
    auto finite = make<int32_t>({x.shape(0)});
    Arrays at(*backend_, copied_);
    backend_->all_finite(n, width, at.in(x), at.out(finite));
    at.done();
    return finite;
  }

  // calls are (gate, up, down, tokens, out_rows); rows of the result that no call writes are 0.
  Out<float> experts(In<float> x, const std::vector<ExpertTuple>& calls, int rows) {
    const int n = extent(x, "x", 0, 2), hidden = extent(x, "x", 1, 2);
    auto out = make<float>({static_cast<size_t>(rows), static_cast<size_t>(hidden)});
    Arrays at(*backend_, copied_);
    float* into = at.out(out);
    std::vector<ExpertCall> list;
    for (const auto& [gate, up, down, tokens, out_rows] : calls) {
      const Matrix &g = gate->matrix, &u = up->matrix, &d = down->matrix;
      if (g.cols != hidden || u.cols != hidden || u.rows != g.rows || d.cols != g.rows ||
          d.rows != hidden) {
        throw std::invalid_argument("gate and up must be [w, hidden], down [hidden, w]");
      }
      expect(out_rows, "out_rows", {static_cast<int64_t>(tokens.size())});
      for (size_t i = 0; i < tokens.size(); ++i) {
        const int32_t token = tokens.data()[i], row = out_rows.data()[i];
        if (token < 0 || token >= n || row < 0 || row >= rows) {
          throw std::invalid_argument("tokens and out_rows must be rows of x and of the result");
        }
      }
      list.push_back({.gate = g,
                      .up = u,
                      .down = d,
                      .tokens = {tokens.data(), tokens.size()},
                      .out_rows = {out_rows.data(), out_rows.size()},
                      .out = into});
    }
    backend_->experts(n, at.in(x), list);
    at.done();
    return out;
  }

  Out<float> combine(In<float> x, In<float> expert_out, In<float> expert_weights,
                     In<float> shared_out, In<float> shared_gate) {
    const int n = extent(x, "x", 0, 2), hidden = extent(x, "x", 1, 2);
    const int experts_per_token = extent(expert_weights, "expert_weights", 1, 2);
    expect(expert_out, "expert_out", {int64_t{n} * experts_per_token, hidden});
    expect(expert_weights, "expert_weights", {n, experts_per_token});
    expect(shared_out, "shared_out", {n, hidden});
    expect(shared_gate, "shared_gate", {n});
    auto out = make<float>({x.shape(0), x.shape(1)});
    std::copy_n(x.data(), x.size(), out.data());
    Arrays at(*backend_, copied_);
    backend_->combine(n, {.hidden = hidden,
                          .experts_per_token = experts_per_token,
                          .expert_out = at.in(expert_out),
                          .expert_weights = at.in(expert_weights),
                          .shared_out = at.in(shared_out),
                          .shared_gate = at.in(shared_gate),
                          .x = at.out(out)});
    at.done();
    return out;
  }

 private:
  void multiply(int n, const In<float>& x, const std::vector<const OwnedMatrix*>& weights,
                std::vector<Out<float>> outs, bool add) {
    Arrays at(*backend_, copied_);
    std::vector<Product> products;
    for (size_t i = 0; i < weights.size(); ++i) {
      expect(x, "x", {n, weights[i]->matrix.cols});
      products.push_back({&weights[i]->matrix, at.out(outs[i]), add});
    }
    const float* input = at.in(x);
    const Unlocked unlocked;
    backend_->matmul(n, input, products);
    at.done();
  }

  const std::unique_ptr<Backend> backend_;
  const bool copied_;
};

}  // namespace

void bind_ops(nb::module_& m) {
  nb::module_ ops = m.def_submodule("ops", "A backend's operations on numpy arrays, for tests.");
  ops.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
    return names;
  });
  nb::class_<OwnedMatrix>(ops, "Matrix")
      .def(nb::init<int, int, const std::string&, std::vector<Bytes>, int, int>(), nb::arg("rows"),
           nb::arg("cols"), nb::arg("dtype"), nb::arg("parts"), nb::arg("bits") = 0,
           nb::arg("group") = 0);
  nb::class_<Ops>(ops, "Backend")
      .def(nb::init<const std::string&, int, const std::string&, const std::string&>(),
           nb::arg("precision"), nb::arg("threads"), nb::arg("backend") = "cpu",
           nb::arg("kernels") = "")
      .def("place", &Ops::place, nb::arg("matrix"), nb::keep_alive<0, 1>())
      .def("times", &Ops::times)
      .def("describe", &Ops::describe)
      .def("compiled", &Ops::compiled)
      .def("embed", &Ops::embed, nb::arg("table"), nb::arg("ids"))
      .def("rms_norm", &Ops::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"))
      .def("matmul", &Ops::matmul, nb::arg("x"), nb::arg("weights"))
      .def("matmul_add", &Ops::matmul_add, nb::arg("x"), nb::arg("weight"), nb::arg("out"))
      .def("causal_conv", &Ops::causal_conv, nb::arg("x"), nb::arg("weight"), nb::arg("state"))
      .def("gated_delta", &Ops::gated_delta, nb::arg("qkv"), nb::arg("z"), nb::arg("a"),
           nb::arg("b"), nb::arg("a_log"), nb::arg("dt_bias"), nb::arg("norm"), nb::arg("state"),
           nb::arg("key_heads"), nb::arg("eps"))
      .def("attention", &Ops::attention, nb::arg("q_gate"), nb::arg("k"), nb::arg("v"),
           nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("keys"), nb::arg("values"),
           nb::arg("position"), nb::arg("rotary_dim"), nb::arg("rope_theta"), nb::arg("eps"))
      .def("route", &Ops::route, nb::arg("logits"), nb::arg("experts_per_token"),
           nb::arg("renormalise"))
      .def("all_finite", &Ops::all_finite, nb::arg("x"))
      .def("experts", &Ops::experts, nb::arg("x"), nb::arg("calls"), nb::arg("rows"))
      .def("combine", &Ops::combine, nb::arg("x"), nb::arg("expert_out"), nb::arg("expert_weights"),
           nb::arg("shared_out"), nb::arg("shared_gate"));
}

}  // namespace flashmoe
