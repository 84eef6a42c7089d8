// _native.Format, Checkpoint, State, Engine.
#include "model/engine.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <optional>

#include "backend/cpu/cpu_backend.h"
#include "bindings/bindings.h"
#include "core/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Extents = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<Extent> to_extents(const Extents& array) {
  std::vector<Extent> result(array.shape(0));
  const int64_t* row = array.data();
  for (Extent& extent : result) {
    extent = {static_cast<int>(row[0]), row[1], row[2]};
    row += 3;
  }
  return result;
}

int64_t total_length(const std::vector<Extent>& extents) {
  int64_t total = 0;
  for (const Extent& extent : extents) total += extent.length;
  return total;
}

// Python has validated the files; what is checked here is only that the table fits together, so
// that no read can leave its buffer.
void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

void add_matrix(CheckpointSpec& spec, const std::string& name, const Format& format,
                const std::vector<Extents>& parts) {
  require(static_cast<int>(parts.size()) == format.parts(), name + ": wrong number of parts");
  MatrixSpec matrix{format, {}};
  for (int part = 0; part < format.parts(); ++part) {
    matrix.parts[part] = to_extents(parts[part]);
    require(total_length(matrix.parts[part]) == format.part_bytes(part),
            name + ": extents and shape disagree");
  }
  spec.matrices[name] = std::move(matrix);
}

void add_vector(CheckpointSpec& spec, const std::string& name, int64_t length,
                const std::string& dtype, const Extents& extents, bool plus_one) {
  VectorSpec vector{length, parse_dtype(dtype), to_extents(extents), plus_one};
  require(total_length(vector.extents) == length * static_cast<int64_t>(size_of(vector.dtype)),
          name + ": extents and length disagree");
  spec.vectors[name] = std::move(vector);
}

void add_experts(CheckpointSpec& spec, const Format& gate, const Format& up, const Format& down,
                 const Extents& extents) {
  ExpertsSpec experts{gate, up, down, to_extents(extents)};
  const int parts = experts.parts();
  require(experts.extents.size() % parts == 0, "experts: extents are not a multiple of parts");
  std::vector<int64_t> lengths;
  for (const Format* format : {&gate, &up, &down}) {
    for (int part = 0; part < format->parts(); ++part) lengths.push_back(format->part_bytes(part));
  }
  for (size_t i = 0; i < experts.extents.size(); ++i) {
    require(experts.extents[i].length == lengths[i % parts], "experts: extent and shape disagree");
  }
  spec.experts.push_back(std::move(experts));
}

ModelConfig to_config(const nb::dict& values) {
  ModelConfig config;
  const std::pair<const char*, int*> numbers[] = {
      {"hidden_size", &config.hidden_size},
      {"vocab_size", &config.vocab_size},
      {"num_attention_heads", &config.num_attention_heads},
      {"num_key_value_heads", &config.num_key_value_heads},
      {"head_dim", &config.head_dim},
      {"rotary_dim", &config.rotary_dim},
      {"linear_num_key_heads", &config.linear_num_key_heads},
      {"linear_num_value_heads", &config.linear_num_value_heads},
      {"linear_key_head_dim", &config.linear_key_head_dim},
      {"linear_value_head_dim", &config.linear_value_head_dim},
      {"linear_conv_kernel_dim", &config.linear_conv_kernel_dim},
      {"num_experts", &config.num_experts},
      {"experts_per_token", &config.experts_per_token},
  };
  for (const auto& [key, number] : numbers) *number = nb::cast<int>(values[key]);
  for (nb::handle type : nb::cast<nb::sequence>(values["layer_types"])) {
    config.attention_layers.push_back(nb::cast<std::string>(type) == "full_attention");
  }
  config.rms_norm_eps = nb::cast<float>(values["rms_norm_eps"]);
  config.rope_theta = nb::cast<float>(values["rope_theta"]);
  config.norm_topk_prob = nb::cast<bool>(values["norm_topk_prob"]);
  return config;
}

// Who wants passes: another thread may say that it does not any more.
struct Request {
  std::atomic<bool> cancelled = false;
  std::atomic<double> seconds = 0;  // of its latest pass, without the wait for its turn
};

// Runs Python's signal handlers (Ctrl-C) now and then from native code that released the GIL;
// taking it back may wait for other threads, so not at every call. Throws Stopped where
// the request is cancelled.
class SignalCheck {
 public:
  explicit SignalCheck(const Request* request = nullptr) : request_(request) {}

  void operator()() {
    if (request_ && request_->cancelled) throw Stopped("the work was cancelled");
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(20)) return;
    last_ = now;
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }

 private:
  using Clock = std::chrono::steady_clock;
  const Request* request_;
  Clock::time_point last_ = Clock::now();
};

// Waits without the GIL until this thread may use the engine and its states.
Turn take_turn(Engine& engine) {
  const nb::gil_scoped_release release;
  return Turn(engine.turns(), SignalCheck());
}

struct PyState {
  Engine& engine;  // kept alive by the Python object
  State state;
  std::atomic<bool> in_use = false;

  PyState(Engine& engine, State state) : engine(engine), state(std::move(state)) {}

  // Holds a state for one thread, or throws StateError.
  class Use {
   public:
    explicit Use(PyState& self) : self_(self) {
      if (self_.in_use.exchange(true, std::memory_order_acquire)) {
        throw StateError("this state is in use by another call; fork() it before, or wait");
      }
    }
    ~Use() { self_.in_use.store(false, std::memory_order_release); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    PyState& self_;
  };
};

// Copies between a cache [kv_heads, capacity, row] and an array [kv_heads, position, row].
void copy_rows(const State& state, int layer, int kv_heads, std::byte* cache, std::byte* array,
               bool to_array) {
  const size_t used = state.row_bytes() * static_cast<size_t>(state.position());
  if (used == 0) return;  // there may be no cache yet
  const size_t stride = state.row_bytes() * static_cast<size_t>(state.cache(layer).capacity);
  for (int head = 0; head < kv_heads; ++head) {
    std::byte* in_cache = cache + stride * head;
    std::byte* in_array = array + used * head;
    std::memcpy(to_array ? in_array : in_cache, to_array ? in_cache : in_array, used);
  }
}

// Calls visit(name, buffer, bytes, shape, dtype) for every tensor of a state.
template <typename Visit>
void visit_tensors(PyState& self, Visit&& visit) {
  const ModelConfig& config = self.engine.config();
  State& state = self.state;
  for (int layer = 0; layer < config.layers(); ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    if (config.attention_layers[layer]) {
      const std::vector<size_t> shape{static_cast<size_t>(config.num_key_value_heads),
                                      static_cast<size_t>(state.position()),
                                      static_cast<size_t>(config.head_dim)};
      visit(prefix + "keys", layer, state.cache(layer).keys.get(), true, shape);
      visit(prefix + "values", layer, state.cache(layer).values.get(), true, shape);
    } else {
      visit(prefix + "conv", layer, state.deltas[layer].conv.get(), false,
            std::vector<size_t>{static_cast<size_t>(config.linear_conv_kernel_dim - 1),
                                static_cast<size_t>(config.conv_channels())});
      visit(prefix + "recurrent", layer, state.deltas[layer].recurrent.get(), false,
            std::vector<size_t>{static_cast<size_t>(config.linear_num_value_heads),
                                static_cast<size_t>(config.linear_key_head_dim),
                                static_cast<size_t>(config.linear_value_head_dim)});
    }
  }
}

nb::object new_array(const std::vector<size_t>& shape, const char* dtype) {
  nb::list dims;
  for (const size_t dim : shape) dims.append(dim);
  return nb::module_::import_("numpy").attr("empty")(nb::tuple(dims), dtype);
}

std::byte* data_of(const nb::object& array) {
  return reinterpret_cast<std::byte*>(
      nb::cast<nb::ndarray<nb::c_contig, nb::device::cpu>>(array).data());
}

nb::dict export_state(PyState& self) {
  const Turn turn = take_turn(self.engine);
  const PyState::Use use(self);
  const bool half = self.state.cache_dtype() == DType::BF16;
  nb::dict result;
  visit_tensors(self, [&](const std::string& name, int layer, std::byte* data, bool cache,
                          const std::vector<size_t>& shape) {
    nb::object array = new_array(shape, cache && half ? "uint16" : "float32");
    if (cache) {
      copy_rows(self.state, layer, static_cast<int>(shape[0]), data, data_of(array), true);
    } else {
      std::memcpy(data_of(array), data, nb::cast<size_t>(array.attr("nbytes")));
    }
    result[name.c_str()] = array;
  });
  return result;
}

// A state of `position` tokens with what export_state() gave, into a fresh state.
void restore_state(PyState& self, int64_t position, const nb::dict& tensors) {
  const Turn turn = take_turn(self.engine);
  const PyState::Use use(self);
  require(self.state.position() == 0, "restore: the state is not a fresh one");
  require(position >= 0, "restore: position is negative");
  State filled = self.state.fork();
  filled.reserve(position);
  filled.advance(position);
  PyState fresh{self.engine, std::move(filled)};
  const bool half = fresh.state.cache_dtype() == DType::BF16;
  visit_tensors(fresh, [&](const std::string& name, int layer, std::byte* data, bool cache,
                           const std::vector<size_t>& shape) {
    require(tensors.contains(name.c_str()), "restore: no tensor " + name);
    const char* dtype = cache && half ? "uint16" : "float32";
    const nb::object array = tensors[name.c_str()];
    nb::list dims;
    for (const size_t dim : shape) dims.append(dim);
    require(nb::cast<bool>(array.attr("shape").equal(nb::tuple(dims))) &&
                nb::cast<std::string>(array.attr("dtype").attr("name")) == dtype,
            "restore: tensor " + name + " has another shape or dtype than this model's");
    if (cache) {
      copy_rows(fresh.state, layer, static_cast<int>(shape[0]), data, data_of(array), false);
    } else {
      std::memcpy(data, data_of(array), nb::cast<size_t>(array.attr("nbytes")));
    }
  });
  self.state = std::move(fresh.state);
}

// float32 logits, or with `routing` a tuple of them and int32 [len(ids), layers,
// experts_per_token].
nb::object forward(Engine& engine, PyState& state, const Ids& ids, bool all_logits, bool routing,
                   Request* request) {
  const auto vocab = static_cast<size_t>(engine.config().vocab_size);
  require(ids.shape(0) > 0, "forward: ids is empty");
  require(&state.engine == &engine, "forward: the state belongs to another model");
  for (size_t i = 0; i < ids.shape(0); ++i) {
    require(ids.data()[i] >= 0 && static_cast<size_t>(ids.data()[i]) < vocab,
            "forward: token id " + std::to_string(ids.data()[i]) + " is not in 0 .. " +
                std::to_string(vocab - 1));
  }
  const std::vector<size_t> shape =
      all_logits ? std::vector<size_t>{ids.shape(0), vocab} : std::vector<size_t>{vocab};
  nb::object logits = new_array(shape, "float32");
  Output out{.logits = reinterpret_cast<float*>(data_of(logits)), .all_logits = all_logits};
  nb::object experts;
  if (routing) {
    experts = new_array({ids.shape(0), static_cast<size_t>(engine.config().layers()),
                         static_cast<size_t>(engine.config().experts_per_token)},
                        "int32");
    out.routing = reinterpret_cast<int32_t*>(data_of(experts));
  }
  const std::span<const int32_t> tokens(ids.data(), ids.shape(0));
  {
    nb::gil_scoped_release release;
    const Turn turn(engine.turns(), SignalCheck(request));
    const PyState::Use use(state);
    const auto start = std::chrono::steady_clock::now();
    engine.forward(state.state, tokens, out, SignalCheck(request));
    if (request) {
      request->seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }
  return routing ? nb::make_tuple(logits, experts) : logits;
}

nb::dict statistics(Engine& engine) {
  const Turn turn = take_turn(engine);
  const Engine::Statistics now = engine.statistics();
  nb::dict result;
  result["reads"] = now.experts.reads;
  result["bytes_read"] = now.experts.bytes_read;
  result["bytes_cached"] = now.experts.bytes_cached;
  result["read_seconds"] = now.experts.read_seconds;
  result["wait_seconds"] = now.experts.wait_seconds;
  result["expert_hits"] = now.experts.hits;
  result["expert_misses"] = now.experts.misses;
  result["rows"] = now.rows;
  result["forward_seconds"] = now.forward_seconds;
  result["resident_bytes"] = now.resident_bytes;
  result["slot_bytes"] = now.slot_bytes;
  result["activation_bytes"] = now.activation_bytes;
  result["head_seconds"] = now.head_seconds;
  return result;
}

nb::list layer_times(Engine& engine) {
  const Turn turn = take_turn(engine);
  nb::list result;
  for (const LayerTimes& times : engine.statistics().layers) {
    nb::dict layer;
    layer["mixer"] = times.mixer;
    layer["router"] = times.router;
    layer["wait"] = times.wait;
    layer["experts"] = times.experts;
    layer["combine"] = times.combine;
    result.append(layer);
  }
  return result;
}

// The class of flashmoe.errors that an exception becomes.
template <typename Exception>
void translate(const char* name) {
  nb::register_exception_translator(
      [](const std::exception_ptr& pointer, void* payload) {
        try {
          std::rethrow_exception(pointer);
        } catch (const Exception& caught) {
          const nb::object type =
              nb::module_::import_("flashmoe.errors").attr(static_cast<const char*>(payload));
          PyErr_SetString(type.ptr(), caught.what());
        }
      },
      const_cast<char*>(name));
}

}  // namespace

void bind_engine(nb::module_& m) {
  translate<CheckpointError>("CheckpointError");
  translate<DeviceError>("DeviceError");
  translate<ReadError>("ReadError");
  translate<StateError>("StateError");
  translate<Stopped>("StoppedError");

  nb::class_<Format>(m, "Format")
      .def(
          "__init__",
          [](Format* self, int rows, int cols, const std::string& dtype, int bits, int group) {
            new (self) Format{rows, cols, parse_dtype(dtype), bits, group};
          },
          "rows"_a, "cols"_a, "dtype"_a, "bits"_a = 0, "group"_a = 0);

  nb::class_<CheckpointSpec>(m, "Checkpoint")
      .def(
          "__init__",
          [](CheckpointSpec* self, std::vector<std::string> files) {
            new (self) CheckpointSpec{std::move(files), {}, {}, {}};
          },
          "files"_a)
      .def("add_matrix", add_matrix, "name"_a, "format"_a, "parts"_a)
      .def("add_vector", add_vector, "name"_a, "length"_a, "dtype"_a, "extents"_a,
           "plus_one"_a = false)
      .def("add_experts", add_experts, "gate"_a, "up"_a, "down"_a, "extents"_a);

  nb::class_<Request>(m, "Request")
      .def(nb::init<>())
      .def("cancel", [](Request& self) { self.cancelled = true; })
      .def_prop_ro("cancelled", [](const Request& self) { return self.cancelled.load(); })
      .def_prop_ro("seconds", [](const Request& self) { return self.seconds.load(); });

  nb::class_<PyState>(m, "State")
      .def_prop_ro("position", [](const PyState& self) { return self.state.position(); })
      .def_prop_ro("nbytes", [](const PyState& self) { return self.state.bytes(); })
      .def_prop_ro("shared",
                   [](const PyState& self) {
                     const KeyValues& shared = self.state.key_values();
                     return nb::make_tuple(reinterpret_cast<uintptr_t>(&shared),
                                           shared.bytes.load());
                   })
      .def(
          "fork",
          [](PyState& self) {
            const nb::gil_scoped_release release;
            const PyState::Use use(self);
            return new PyState{self.engine, self.state.fork()};
          },
          nb::rv_policy::take_ownership, nb::keep_alive<0, 1>())
      .def("export", export_state)
      .def("restore", restore_state, "position"_a, "tensors"_a);

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, const nb::dict& config, const CheckpointSpec& checkpoint,
             const std::string& backend, const std::string& precision, int threads,
             int64_t cache_bytes, int chunk, const std::string& kernels, bool overlap,
             const std::optional<nb::callable>& progress) {
            const Engine::Options options{backend, precision, threads, cache_bytes,
                                          chunk,   kernels,   overlap};
            const ModelConfig parsed = to_config(config);
            require(static_cast<size_t>(parsed.layers()) == checkpoint.experts.size(),
                    "Engine: experts of every layer are needed");
            for (const ExpertsSpec& experts : checkpoint.experts) {
              require(
                  static_cast<int>(experts.extents.size()) == parsed.num_experts * experts.parts(),
                  "Engine: a layer has another number of experts than the config");
            }
            nb::gil_scoped_release release;
            new (self) Engine(parsed, checkpoint, options, [&](int64_t done, int64_t total) {
              nb::gil_scoped_acquire gil;
              if (PyErr_CheckSignals() != 0) throw nb::python_error();
              if (progress) (*progress)(done, total);
            });
          },
          "config"_a, "checkpoint"_a, nb::kw_only(), "backend"_a = "cpu", "precision"_a = "int8",
          "threads"_a = 1, "cache_bytes"_a = 0, "chunk"_a = 256, "kernels"_a = "",
          "overlap"_a = false, "progress"_a = nb::none())
      .def_prop_ro("backend", [](const Engine& self) { return self.backend(); })
      .def(
          "new_state",
          [](Engine& self) {
            const nb::gil_scoped_release release;
            const Turn turn(self.turns(), SignalCheck());
            return new PyState{self, self.new_state()};
          },
          nb::rv_policy::take_ownership, nb::keep_alive<0, 1>())
      .def("forward", forward, "state"_a, "ids"_a, "all_logits"_a = false, "routing"_a = false,
           "request"_a = nb::none())
      .def("stats", statistics)
      .def("layer_times", layer_times)
      .def("close", [](Engine& self) {
        const nb::gil_scoped_release release;
        const Turn turn(self.turns(), SignalCheck());
        self.close();
      });

  m.def("cpu_kernels", cpu_kernels);
  m.def("backends", Engine::backends);
}

}  // namespace flashmoe
