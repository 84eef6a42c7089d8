// _native.Request, State, Engine.
#include "model/engine.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <system_error>
#include <thread>

#include "backend/cpu/cpu_backend.h"
#include "bindings/bindings.h"
#include "core/error.h"
#include "core/process.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

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
    require_running();
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

// A call that uses an engine or a state of it. Waits for its turn without the GIL.
class EngineCall {
 public:
  explicit EngineCall(Engine& engine, const Request* request = nullptr)
      : engine_(engine), turn_(take(engine, request)) {}
  ~EngineCall() {
    if (!engine_.close_asked()) return;
    const nb::gil_scoped_release release;
    engine_.close();
  }
  EngineCall(const EngineCall&) = delete;
  EngineCall& operator=(const EngineCall&) = delete;

 private:
  static Turn take(Engine& engine, const Request* request) {
    engine.require_home();
    const nb::gil_scoped_release release;
    return Turn(engine.turns(), SignalCheck(request));
  }

  const Call call_;
  Engine& engine_;
  const Turn turn_;
};

void close(Engine& engine) {
  if (engine.elsewhere()) {
    engine.abandon();
  } else if (engine.turns().asked()) {
    engine.ask_to_close();
  } else {
    const EngineCall call(engine);
    const nb::gil_scoped_release release;
    engine.close();
  }
}

struct PyState {
  Engine& engine;  // kept alive by the Python object
  State state;
  // What the latest pass predicts, float32 [vocab], or None: whatever interrupts Python between a
  // pass and the use of its result, the prediction is not lost. Never written to.
  nb::object logits;
  std::atomic<bool> in_use = false;

  PyState(Engine& engine, State state, nb::object logits = nb::none())
      : engine(engine), state(std::move(state)), logits(std::move(logits)) {}

  // Holds a state for one call, or throws StateError.
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

nb::object new_array(const std::vector<size_t>& shape, const char* dtype) {
  nb::list dims;
  for (const size_t dim : shape) dims.append(dim);
  return nb::module_::import_("numpy").attr("empty")(nb::tuple(dims), dtype);
}

std::byte* data_of(const nb::object& array) {
  return reinterpret_cast<std::byte*>(
      nb::cast<nb::ndarray<nb::c_contig, nb::device::cpu>>(array).data());
}

// What numpy calls a tensor of the state; it has no bfloat16, which travels as uint16.
const char* numpy_dtype(DType dtype) {
  return dtype == DType::BF16 ? "uint16" : "float32";
}

nb::dict export_state(PyState& self) {
  const EngineCall call(self.engine);
  nb::dict result;
  for (const StateTensor& tensor : self.state.tensors(self.state.position())) {
    const std::vector<size_t> shape(tensor.shape.begin(), tensor.shape.end());
    const nb::object array = new_array(shape, numpy_dtype(tensor.dtype));
    self.state.read(tensor, data_of(array));
    result[tensor.name.c_str()] = array;
  }
  if (!self.logits.is_none()) result["logits"] = self.logits;
  return result;
}

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// The array of that name, if it has exactly this shape and type: what it holds may come from a file
// that somebody else wrote.
AnyArray checked_array(const nb::dict& tensors, const std::string& name, DType dtype,
                       const std::vector<int64_t>& shape) {
  require(tensors.contains(name.c_str()), "restore: no tensor " + name);
  AnyArray array;
  require(nb::try_cast(tensors[name.c_str()], array, false),
          "restore: tensor " + name + " is not a contiguous array");
  bool same = array.ndim() == shape.size() &&
              array.dtype() == (dtype == DType::BF16 ? nb::dtype<uint16_t>() : nb::dtype<float>());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = array.shape(i) == static_cast<size_t>(shape[i]);
  }
  require(same, "restore: tensor " + name + " has another shape or dtype than this model's");
  return array;
}

// A state of `position` tokens with what export_state() gave, into a fresh state.
void restore_state(PyState& self, int64_t position, const nb::dict& tensors) {
  const PyState::Use use(self);
  const EngineCall call(self.engine);
  require(self.state.position() == 0, "restore: the state is not a fresh one");
  require(position >= 0 && position <= INT32_MAX, "restore: position is not that of a state");
  std::vector<AnyArray> arrays;
  for (const StateTensor& tensor : self.state.tensors(position)) {
    arrays.push_back(checked_array(tensors, tensor.name, tensor.dtype, tensor.shape));
  }
  nb::object logits = nb::none();
  if (tensors.contains("logits")) {
    checked_array(tensors, "logits", DType::F32, {self.engine.config().vocab_size});
    logits = tensors["logits"];
  }
  State filled = self.state.fork();
  filled.reserve(position);
  filled.advance(position);
  size_t index = 0;
  for (const StateTensor& tensor : filled.tensors(position)) {
    filled.write(tensor, static_cast<const std::byte*>(arrays[index++].data()));
  }
  self.state = std::move(filled);
  self.logits = std::move(logits);
}

// Dtype, as safetensors names it, and shape of the tensors that a state of so many tokens exports.
nb::dict state_layout(Engine& engine, int64_t position) {
  const EngineCall call(engine);
  require(position >= 0, "state_layout: position is negative");
  nb::dict result;
  const auto add = [&](const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
    nb::list dims;
    for (const int64_t dim : shape) dims.append(dim);
    result[name.c_str()] = nb::make_tuple(dtype == DType::BF16 ? "BF16" : "F32", nb::tuple(dims));
  };
  for (const StateTensor& tensor : engine.new_state().tensors(position)) {
    add(tensor.name, tensor.dtype, tensor.shape);
  }
  add("logits", DType::F32, {engine.config().vocab_size});
  return result;
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
  // All that could fail after the pass is done before it.
  nb::object last = all_logits ? new_array({vocab}, "float32") : logits;
  std::byte* const last_data = data_of(last);
  last.attr("setflags")("write"_a = false);
  nb::object experts;
  if (routing) {
    experts = new_array({ids.shape(0), static_cast<size_t>(engine.config().layers()),
                         static_cast<size_t>(engine.config().experts_per_token)},
                        "int32");
    out.routing = reinterpret_cast<int32_t*>(data_of(experts));
  }
  const std::span<const int32_t> tokens(ids.data(), ids.shape(0));
  const PyState::Use use(state);
  const EngineCall call(engine, request);
  const int64_t before = state.state.position();
  try {
    const nb::gil_scoped_release release;
    const auto start = std::chrono::steady_clock::now();
    engine.forward(state.state, tokens, out, [&engine, check = SignalCheck(request)]() mutable {
      if (engine.close_asked()) throw StateError("this model was closed in the middle of a call");
      check();
    });
    if (request) {
      request->seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  } catch (...) {
    // Some chunks may be done, and nobody knows what they predict.
    if (state.state.position() != before) state.logits = nb::none();
    throw;
  }
  if (all_logits) {
    std::memcpy(last_data, out.logits + (tokens.size() - 1) * vocab, vocab * sizeof(float));
  }
  state.logits = last;
  return routing ? nb::make_tuple(logits, experts) : logits;
}

nb::dict statistics(Engine& engine) {
  const EngineCall call(engine);
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
  result["scratch_bytes"] = now.scratch_bytes;
  result["head_seconds"] = now.head_seconds;
  result["busy_seconds"] = now.busy_seconds;
  return result;
}

nb::list layer_times(Engine& engine) {
  const EngineCall call(engine);
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
void raise(const void* name, const char* message) {
  const nb::object type =
      nb::module_::import_("flashmoe.errors").attr(static_cast<const char*>(name));
  // It may name a path, which need not be UTF-8.
  const nb::object text = nb::steal(PyUnicode_DecodeFSDefault(message));
  if (text.is_valid()) PyErr_SetObject(type.ptr(), text.ptr());
}

template <typename Exception>
void translate(const char* name) {
  nb::register_exception_translator(
      [](const std::exception_ptr& pointer, void* payload) {
        try {
          std::rethrow_exception(pointer);
        } catch (const Exception& caught) {
          raise(payload, caught.what());
        }
      },
      const_cast<char*>(name));
}

// A Python function to be called, and dropped, by threads that have not the GIL.
std::function<bool(int64_t)> callable(const nb::callable& function) {
  const std::shared_ptr<nb::callable> kept(new nb::callable(function), [](nb::callable* last) {
    const nb::gil_scoped_acquire gil;
    delete last;
  });
  return [kept](int64_t bytes) {
    const nb::gil_scoped_acquire gil;
    return nb::cast<bool>((*kept)(bytes));
  };
}

// Before the interpreter ends; see core/process.h. Ctrl-C ends the wait.
void end_program() {
  end_calls();
  while (calls_under_way() > 0) {
    {
      const nb::gil_scoped_release release;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

}  // namespace

void bind_engine(nb::module_& m) {
  watch_process();
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(end_program));

  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const std::bad_alloc&) {
      raise("OutOfMemoryError",
            "the system does not grant the memory for this; end other programs, or give the "
            "experts a smaller cache");
    } catch (const std::system_error& error) {  // of std::thread
      raise("OutOfMemoryError", (std::string("the system does not grant a thread: ") +
                                 error.what() + "; end other programs, or give fewer threads")
                                    .c_str());
    }
  });
  translate<CheckpointError>("CheckpointError");
  translate<DeviceError>("DeviceError");
  translate<OutOfMemoryError>("OutOfMemoryError");
  translate<ReadError>("ReadError");
  translate<StateError>("StateError");
  translate<Stopped>("StoppedError");

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
            const PyState::Use hold(self);
            self.engine.require_home();
            std::optional<State> copy;
            {
              const nb::gil_scoped_release release;
              copy = self.state.fork();
            }
            return new PyState(self.engine, std::move(*copy), self.logits);
          },
          nb::rv_policy::take_ownership, nb::keep_alive<0, 1>())
      .def_prop_ro("logits", [](const PyState& self) { return self.logits; })
      .def("export", export_state)
      .def("restore", restore_state, "position"_a, "tensors"_a);

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, const nb::dict& config, const CheckpointSpec& checkpoint,
             const char* backend, const char* precision, int threads, int64_t cache_bytes,
             int chunk, const char* kernels, bool overlap,
             const std::optional<nb::callable>& may_grow,
             const std::optional<nb::callable>& progress) {
            const Setting setting{
                backend, precision, threads, cache_bytes,
                chunk,   kernels,   overlap, may_grow ? callable(*may_grow) : nullptr};
            const ModelConfig parsed = to_config(config, checkpoint);
            const Unlocked unlocked;
            new (self) Engine(parsed, checkpoint, setting, [&](int64_t done, int64_t total) {
              require_running();
              nb::gil_scoped_acquire gil;
              if (PyErr_CheckSignals() != 0) throw nb::python_error();
              if (progress) (*progress)(done, total);
            });
          },
          "config"_a, "checkpoint"_a, nb::kw_only(), "backend"_a = "cpu", "precision"_a = "int8",
          "threads"_a = 1, "cache_bytes"_a = 0, "chunk"_a = 256, "kernels"_a = "",
          "overlap"_a = false, "may_grow"_a = nb::none(), "progress"_a = nb::none())
      .def_prop_ro("backend", [](const Engine& self) { return self.backend(); })
      .def(
          "new_state",
          [](Engine& self) {
            const EngineCall call(self);
            return new PyState(self, self.new_state());
          },
          nb::rv_policy::take_ownership, nb::keep_alive<0, 1>())
      .def("state_layout", state_layout, "position"_a)
      .def("forward", forward, "state"_a, "ids"_a, "all_logits"_a = false, "routing"_a = false,
           "request"_a = nb::none())
      .def("stats", statistics)
      .def("layer_times", layer_times)
      .def("close", close);

  m.def("cpu_kernels", cpu_kernels);
  m.def("backends", Engine::backends);
}

}  // namespace flashmoe
