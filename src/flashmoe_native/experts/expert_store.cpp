#include "experts/expert_store.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/finite.h"
#include "core/stopwatch.h"

namespace flashmoe {
namespace {

// Tokens after which a use counts half. Between 16 and 256 it matters little.
constexpr float kHalfLife = 64;
constexpr float kPinned = std::numeric_limits<float>::infinity();
constexpr float kEmpty = -1;
// In which a cache grows to its full size.
constexpr int kSteps = 16;

const Format* formats(const ExpertsSpec& spec, int matrix) {
  const Format* all[] = {&spec.gate, &spec.up, &spec.down};
  return all[matrix];
}

Matrix matrix_at(const Format& format, const std::byte* slot, const int64_t*& part) {
  const std::byte* parts[3] = {};
  for (int i = 0; i < format.parts(); ++i) parts[i] = slot + *part++;
  return make_matrix(format, parts);
}

}  // namespace

ExpertStore::ExpertStore(Backend& backend, IoQueue& io,
                         const std::vector<std::unique_ptr<File>>& files,
                         const std::vector<ExpertsSpec>& layers, const SlotOptions& options,
                         std::function<bool(int64_t bytes)> may_grow)
    : backend_(backend),
      io_(io),
      files_(files),
      layers_(layers),
      options_(options),
      size_(slots_for(layers, options)),
      slots_(static_cast<size_t>(size_.count)),
      slab_(backend.allocate(Memory::kSlots, static_cast<size_t>(size_.bytes()),
                             static_cast<size_t>(size_.stride))),
      landing_(backend.allocate_landing(static_cast<size_t>(size_.bytes()))),
      worth_(slots_.size(), kEmpty),
      may_grow_(std::move(may_grow)) {
  int64_t total = 0, most = 0;
  for (const ExpertsSpec& spec : layers_) {
    layer_base_.push_back(total);
    total += experts_in(spec);
    most = std::max<int64_t>(most, experts_in(spec));
  }
  slot_of_.assign(static_cast<size_t>(total), -1);
  uses_.assign(static_cast<size_t>(total), 0);
  const int all = static_cast<int>(slots_.size());
  step_ = std::max(1, all / kSteps);
  open_ = may_grow_ ? std::min(all, std::max(options.min_slots, step_)) : all;
  unpinned_ = open_;
  // Room for all that these will ever hold, so that taking note of something never fails.
  for (std::vector<int>* list : {&ahead_, &ready_, &given_, &landed_}) list->reserve(slots_.size());
  arrived_.reserve(slots_.size());
  backlog_.reserve(static_cast<size_t>(most));
}

ExpertStore::~ExpertStore() {
  cancel();
}

void ExpertStore::pin(int slot) {
  worth_[slot] = kPinned;
  --unpinned_;
}

void ExpertStore::unpin(int slot) {
  Slot& s = slots_[slot];
  s.purpose = Purpose::kAsked;
  worth_[slot] = s.expert < 0 ? kEmpty : uses_[index(s.layer, s.expert)];
  ++unpinned_;
}

void ExpertStore::end_pass(int tokens) {
  release();
  weight_ *= std::exp2(static_cast<float>(tokens) / kHalfLife);
  if (weight_ < 1e20f) return;
  const float factor = 1 / weight_;  // what becomes zero was used long ago
  for (float& uses : uses_) uses *= factor;
  for (float& worth : worth_) {
    if (worth > 0 && worth != kPinned) worth *= factor;
  }
  weight_ = 1;
}

void ExpertStore::forget(int slot) {
  if (slots_[slot].expert >= 0) slot_of(slots_[slot].layer, slots_[slot].expert) = -1;
  slots_[slot].layer = slots_[slot].expert = -1;
}

void ExpertStore::start(int layer, std::span<const int32_t> experts, std::span<const int32_t> uses,
                        bool then_next) {
  release();
  layer_ = layer;
  then_next_ = then_next;
  for (size_t i = 0; i < experts.size(); ++i) {
    uses_[index(layer, experts[i])] += weight_ * static_cast<float>(uses[i]);
  }
  backlog_.clear();
  backlog_at_ = 0;
  int64_t hits = 0;
  for (const int32_t expert : experts) {
    const int at = slot_of(layer, expert);
    if (at < 0) {
      backlog_.push_back(expert);
      continue;
    }
    Slot& slot = slots_[at];
    hits += slot.purpose == Purpose::kAsked || !slot.was_read;
    if (slot.purpose == Purpose::kAsked) pin(at);
    slot.purpose = Purpose::kAsked;
    if (slot.landed) {
      ready_.push_back(at);
    } else {
      ++wanted_;
    }
  }
  // What was read ahead in vain is a cached expert like others, once it has landed.
  for (const int slot : ahead_) {
    if (slots_[slot].purpose != Purpose::kAhead) continue;
    slots_[slot].purpose = Purpose::kVain;
    if (slots_[slot].landed) unpin(slot);
  }
  ahead_.clear();
  {
    std::lock_guard lock(mutex_);
    statistics_.hits += hits;
    statistics_.misses += static_cast<int64_t>(experts.size()) - hits;
  }
  read_backlog();
  read_next_layer();
}

void ExpertStore::read_next_layer() {
  if (!then_next_ || starved()) return;
  then_next_ = false;
  read_ahead(layer_ + 1);
}

void ExpertStore::read_ahead(int layer) {
  const int experts = experts_in(layers_[layer]);
  // Those in slots first, lest one is thrown out for another.
  for (int expert = 0; expert < experts; ++expert) {
    const int at = slot_of(layer, expert);
    if (at < 0) continue;
    Slot& slot = slots_[at];
    if (slot.purpose == Purpose::kAsked) {
      pin(at);
      slot.was_read = false;
    }  // else a read in vain that is still under way: it pins the slot
    slot.purpose = Purpose::kAhead;
    ahead_.push_back(at);
  }
  for (int expert = 0; expert < experts; ++expert) {
    if (slot_of(layer, expert) < 0 && !try_read(layer, expert, true)) break;
  }
}

void ExpertStore::read_backlog() {
  while (backlog_at_ < backlog_.size() && try_read(layer_, backlog_[backlog_at_], false)) {
    ++backlog_at_;
  }
}

// An empty slot; else a new one, while there may be more; else the one least worth keeping. -1
// where all are pinned.
int ExpertStore::choose_slot() {
  const auto least = std::min_element(worth_.begin(), worth_.begin() + open_);
  if (*least != kEmpty && open_more()) return choose_slot();
  return unpinned_ == 0 ? -1 : static_cast<int>(least - worth_.begin());
}

bool ExpertStore::open_more() {
  const int more = std::min(step_, static_cast<int>(slots_.size()) - open_);
  if (more == 0 || !may_grow_) return false;
  if (!may_grow_(more * size_.stride)) {
    may_grow_ = nullptr;
    return false;
  }
  open_ += more;
  unpinned_ += more;
  return true;
}

bool ExpertStore::try_read(int layer, int expert, bool ahead) {
  const int index = choose_slot();
  if (index < 0) return false;
  // What can fail comes first: a slot must never be said to hold what nobody reads.
  const SlotLayout layout = slot_layout(layers_[layer], expert, options_);
  std::vector<IoQueue::Task> reads;
  for (const SlotLayout::Read& part : layout.reads) {
    reads.emplace_back([this, index, part] { read(index, part); });
  }
  {
    // No read of the slot is under way, and none begins before its end is counted.
    std::lock_guard lock(mutex_);
    slots_[index].reads_left = static_cast<int>(reads.size());
    slots_[index].failure = nullptr;
  }
  io_.submit(std::move(reads));
  pin(index);
  forget(index);
  Slot& slot = slots_[index];
  slot.layer = layer;
  slot.expert = expert;
  slot.landed = slot.placed = false;
  slot.purpose = ahead ? Purpose::kAhead : Purpose::kAsked;
  slot.was_read = ahead;
  slot_of(layer, expert) = index;
  slot.parts = layout.parts;
  ++in_flight_;
  if (ahead) {
    ahead_.push_back(index);
  } else {
    ++wanted_;
  }
  return true;
}

void ExpertStore::read(int slot, const SlotLayout::Read& part) {
  std::exception_ptr failure;
  int64_t cached = 0;
  Stopwatch watch;
  try {
    std::byte* const to = landing_place(slot) + part.slot_offset;
    const File& file = *files_[part.file];
    if (part.direct) {
      file.read_direct(part.offset, part.length, to);
    } else {
      cached = file.read(part.offset, part.length, to);
      // What a slot keeps is not kept twice.
      if (options_.direct) file.forget(part.offset, part.length);
    }
  } catch (...) {
    failure = std::current_exception();
  }
  const double elapsed = watch.lap();
  std::lock_guard lock(mutex_);
  if (failure) slots_[slot].failure = failure;
  statistics_.reads += 1;
  statistics_.bytes_read += part.length;
  if (cached < 0) statistics_.bytes_cached = -1;
  if (statistics_.bytes_cached >= 0) statistics_.bytes_cached += cached;
  statistics_.read_seconds += elapsed;
  if (--slots_[slot].reads_left == 0) {
    landed_.push_back(slot);
    landed_wake_.notify_one();
  }
}

ExpertStore::Arrived ExpertStore::arrived(int slot) {
  if (!slots_[slot].placed && landing_) {
    backend_.copy(memory(slot), landing_place(slot), static_cast<size_t>(size_.stride));
  }
  slots_[slot].placed = true;
  const ExpertsSpec& spec = layers_[slots_[slot].layer];
  Arrived result{slots_[slot].expert, {}, {}, {}};
  const int64_t* part = slots_[slot].parts.data();
  result.gate = matrix_at(spec.gate, memory(slot), part);
  result.up = matrix_at(spec.up, memory(slot), part);
  result.down = matrix_at(spec.down, memory(slot), part);
  return result;
}

std::span<const ExpertStore::Arrived> ExpertStore::next(const std::function<void()>& finish,
                                                        const std::function<void()>& check) {
  if (starved()) {
    finish();
    release();
  }
  while (ready_.empty() && in_flight_ > 0 && (wanted_ > 0 || starved())) {
    {
      std::unique_lock lock(mutex_);
      Stopwatch watch;
      while (!landed_wake_.wait_for(lock, std::chrono::milliseconds(50),
                                    [&] { return !landed_.empty(); })) {
        lock.unlock();
        check();
        lock.lock();
      }
      statistics_.wait_seconds += watch.lap();
    }
    absorb_landed();
    read_backlog();
  }
  read_next_layer();
  return ready();
}

std::span<const ExpertStore::Arrived> ExpertStore::ready() {
  absorb_landed();
  arrived_.clear();
  for (const int slot : ready_) arrived_.push_back(arrived(slot));
  given_.insert(given_.end(), ready_.begin(), ready_.end());
  ready_.clear();
  return arrived_;
}

// Takes note of the slots whose reads are done; if one that start() asked for failed, cancels the
// rest and throws what was thrown there.
void ExpertStore::absorb_landed() {
  if (const std::exception_ptr failure = take_landed()) {
    cancel();
    std::rethrow_exception(failure);
  }
}

std::exception_ptr ExpertStore::take_landed() {
  std::exception_ptr failure;
  if (in_flight_ == 0) return failure;
  std::lock_guard lock(mutex_);
  for (const int index : landed_) {
    Slot& slot = slots_[index];
    --in_flight_;
    slot.landed = true;
    const bool failed = slot.failure != nullptr;
    if (failed) forget(index);
    if (slot.purpose == Purpose::kAsked) {
      --wanted_;
      ready_.push_back(index);
      if (failed) failure = slot.failure;
    } else if (failed || slot.purpose == Purpose::kVain) {
      unpin(index);
    }
  }
  landed_.clear();
  return failure;
}

void ExpertStore::release() {
  for (const int slot : given_) unpin(slot);
  given_.clear();
  read_backlog();
}

void ExpertStore::cancel() {
  backlog_.clear();
  backlog_at_ = 0;
  then_next_ = false;
  while (in_flight_ > 0) {
    {
      std::unique_lock lock(mutex_);
      landed_wake_.wait(lock, [&] { return !landed_.empty(); });
    }
    take_landed();
  }
  for (const int slot : ahead_) {
    if (slots_[slot].purpose == Purpose::kAhead) unpin(slot);
  }
  ahead_.clear();
  given_.insert(given_.end(), ready_.begin(), ready_.end());
  ready_.clear();
  release();
}

std::string ExpertStore::find_not_finite(int layer, std::span<const int32_t> experts) const {
  const ExpertsSpec& spec = layers_[layer];
  std::vector<std::byte> bytes;
  for (const int32_t expert : experts) {
    const Extent* extent = &spec.extents[static_cast<size_t>(expert) * spec.parts()];
    for (int matrix = 0; matrix < 3; ++matrix) {
      const Format& format = *formats(spec, matrix);
      for (int part = 0; part < format.parts(); ++part, ++extent) {
        if (format.bits > 0 && part == 0) continue;  // words: every value is valid
        bytes.resize(static_cast<size_t>(extent->length));
        const File& file = *files_[extent->file];
        file.read(extent->offset, extent->length, bytes.data());
        const int64_t index = first_not_finite(bytes.data(), extent->length, format.dtype);
        if (index < 0) continue;
        static const char* const kMatrices[] = {"gate_proj", "up_proj", "down_proj"};
        static const char* const kParts[] = {"weight", "scales", "biases"};
        return file.path() + ": layer " + std::to_string(layer) + ", expert " +
               std::to_string(expert) + ", " + kMatrices[matrix] + "." + kParts[part] +
               ": element " + std::to_string(index) +
               " is infinite or NaN; the file is damaged, download or convert it again";
      }
    }
  }
  return {};
}

ExpertStore::Statistics ExpertStore::statistics() const {
  std::lock_guard lock(mutex_);
  return statistics_;
}

}  // namespace flashmoe
