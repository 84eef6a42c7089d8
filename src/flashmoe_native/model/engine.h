// A loaded model: its files, its backend and what runs on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/file.h"
#include "core/io_queue.h"
#include "core/process.h"
#include "core/spec.h"
#include "core/turn.h"
#include "experts/expert_store.h"
#include "model/config.h"
#include "model/forward.h"
#include "model/loader.h"
#include "model/setting.h"
#include "model/state.h"
#include "model/weights.h"

namespace flashmoe {

class Engine {
 public:
  struct Statistics {
    ExpertStore::Statistics experts;
    int64_t rows = 0;  // passed to Forward
    double forward_seconds = 0;
    int64_t resident_bytes = 0, slot_bytes = 0, activation_bytes = 0, scratch_bytes = 0;
    std::vector<LayerTimes> layers;
    double head_seconds = 0;
    double busy_seconds = 0;  // of the backend's threads together
  };

  // The backends of this build, the best last.
  static std::vector<std::string> backends();

  // Throws ReadError, CheckpointError and DeviceError.
  Engine(ModelConfig config, CheckpointSpec spec, Setting setting, const Progress& progress);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // One thread at a time uses an engine and its states: the caller of what follows has a Turn.
  Turns& turns() { return turns_; }

  State new_state();
  // Appends ids to state, a chunk at a time; `out` is that of all ids. After an exception state is
  // as it was before the chunk that failed. Throws ReadError, CheckpointError, StateError and what
  // `check` throws.
  void forward(State& state, std::span<const int32_t> ids, const Output& out,
               const std::function<void()>& check);
  Statistics statistics() const;
  // Frees weights and slots and ends its threads; forward() and new_state() then throw StateError.
  void close();
  // Has the call under way stop, and whoever makes it close the engine: what a signal handler can
  // do that runs in the middle of that call.
  void ask_to_close() { close_asked_ = true; }
  bool close_asked() const { return close_asked_; }
  // Whether this process was forked since the engine was made, and has none of its threads.
  bool elsewhere() const { return origin_.elsewhere(); }
  void require_home() const;  // throws StateError where it was
  // Leaves everything but its files as it lies: the threads that it would join are another
  // process's.
  void abandon();

  const ModelConfig& config() const { return config_; }
  const std::string& backend() const { return setting_.backend; }

 private:
  void require_open() const;

  const ModelConfig config_;
  const CheckpointSpec spec_;
  const Setting setting_;
  const Origin origin_;
  std::atomic<bool> close_asked_ = false;
  Turns turns_;
  int64_t rows_ = 0;
  double forward_seconds_ = 0;
  int64_t resident_bytes_ = 0, mapped_bytes_ = 0;

  // In the order in which they need one another.
  std::unique_ptr<Backend> backend_;
  std::vector<std::unique_ptr<File>> files_;
  std::unique_ptr<IoQueue> io_;
  std::vector<Buffer> weight_memory_;
  Weights weights_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<Forward> forward_;
};

// The backend that a setting asks for; throws std::invalid_argument where this build has it not.
std::unique_ptr<Backend> make_backend(const Setting& setting);

}  // namespace flashmoe
