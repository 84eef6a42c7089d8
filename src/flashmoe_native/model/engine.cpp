#include "model/engine.h"

#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/metal/metal_backend.h"
#include "core/error.h"
#include "core/stopwatch.h"

namespace flashmoe {
namespace {

std::unique_ptr<Backend> open_backend(const Setting& setting, const ModelConfig& config) {
  std::unique_ptr<Backend> backend = make_backend(setting);
  backend->require({.conv_taps = config.linear_conv_kernel_dim,
                    .key_dim = config.linear_key_head_dim,
                    .value_dim = config.linear_value_head_dim,
                    .head_dim = config.head_dim,
                    .experts = config.num_experts,
                    .experts_per_token = config.experts_per_token});
  return backend;
}

std::vector<std::unique_ptr<File>> open_all(const std::vector<std::string>& paths) {
  std::vector<std::unique_ptr<File>> files;
  for (const std::string& path : paths) files.push_back(std::make_unique<File>(path));
  return files;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const Setting& setting) {
  if (setting.backend == "cpu") {
    return make_cpu_backend(parse_precision(setting.precision), setting.threads);
  }
#ifdef FLASHMOE_METAL
  if (setting.backend == "metal") return make_metal_backend(setting.kernels, setting.overlap);
#endif
  throw std::invalid_argument("no such backend here: " + setting.backend);
}

std::vector<std::string> Engine::backends() {
#ifdef FLASHMOE_METAL
  return {"cpu", "metal"};
#else
  return {"cpu"};
#endif
}

Engine::Engine(ModelConfig config, CheckpointSpec spec, Setting setting, const Progress& progress)
    : config_(std::move(config)),
      spec_(std::move(spec)),
      setting_(std::move(setting)),
      backend_(open_backend(setting_, config_)),
      files_(open_all(spec_.files)),
      io_(std::make_unique<IoQueue>(kReadsAtOnce)) {
  Loader loader(*backend_, setting_.weight_rules(), *io_, files_, spec_);
  weights_ = get_weights(loader, config_);
  weight_memory_ = loader.finish(progress);
  resident_bytes_ = loader.placement().bytes();
  mapped_bytes_ = loader.placement().mapped_bytes();
  SlotOptions slots = setting_.slot_options(config_.experts_per_token);
  slots.direct = slots.direct && can_read_direct(files_, spec_.experts);
  store_ = std::make_unique<ExpertStore>(*backend_, *io_, files_, spec_.experts, slots,
                                         setting_.may_grow);
  forward_ = std::make_unique<Forward>(*backend_, config_, weights_, *store_, setting_.chunk);
}

void Engine::require_open() const {
  if (!forward_) throw StateError("this model is closed; open it again with flashmoe.Model(...)");
}

State Engine::new_state() {
  require_open();
  return State(*backend_, config_, setting_.cache_dtype());
}

void Engine::forward(State& state, std::span<const int32_t> ids, const Output& out,
                     const std::function<void()>& check) {
  require_open();
  // A weight that is a part of its file's pages would end the process where the file no longer is.
  if (mapped_bytes_ > 0) {
    for (const auto& file : files_) file->require_whole();
  }
  Stopwatch watch;
  const auto chunk = static_cast<size_t>(forward_->chunk());
  for (size_t begin = 0; begin < ids.size(); begin += chunk) {
    const auto part = ids.subspan(begin, std::min(chunk, ids.size() - begin));
    const bool last = begin + part.size() == ids.size();
    Output of_part = out;
    if (out.all_logits) {
      of_part.logits += begin * static_cast<size_t>(config_.vocab_size);
    } else if (!last) {
      of_part.logits = nullptr;
    }
    if (out.routing) of_part.routing += begin * config_.layers() * config_.experts_per_token;
    rows_ += static_cast<int64_t>(part.size());
    forward_->run(state, part, of_part, check);
  }
  forward_seconds_ += watch.lap();
}

Engine::Statistics Engine::statistics() const {
  require_open();
  return {.experts = store_->statistics(),
          .rows = rows_,
          .forward_seconds = forward_seconds_,
          .resident_bytes = resident_bytes_,
          .slot_bytes = store_->slot_bytes(),
          .activation_bytes = forward_->bytes(),
          .scratch_bytes = backend_->scratch_bytes(),
          .layers = forward_->layer_times(),
          .head_seconds = forward_->head_seconds(),
          .busy_seconds = backend_->busy_seconds()};
}

void Engine::close() {
  forward_.reset();
  store_.reset();
  weight_memory_.clear();
  io_.reset();
  files_.clear();
  backend_->stop();  // states still have memory of it
}

Engine::~Engine() {
  if (origin_.elsewhere()) abandon();
}

void Engine::require_home() const {
  if (!origin_.elsewhere()) return;
  throw StateError(
      "this model was opened before this process was forked, and its threads are not here: open it "
      "again in this process, or start processes with multiprocessing's \"spawn\"");
}

void Engine::abandon() {
  static_cast<void>(forward_.release());
  static_cast<void>(store_.release());
  for (Buffer& memory : weight_memory_) static_cast<void>(memory.release());
  static_cast<void>(io_.release());
  static_cast<void>(backend_.release());
  files_.clear();
}

}  // namespace flashmoe
