#include "experts/expert_store.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/finite.h"
#include "core/round.h"
#include "core/stopwatch.h"

namespace flashmoe {
namespace {

// Bytes between two parts that are read for nothing rather than with a read of their own.
constexpr int64_t kMaxGap = 4096;

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

// Whether every file with experts may be read past the page cache.
bool can_read_direct(const std::vector<std::unique_ptr<File>>& files,
                     const std::vector<ExpertsSpec>& layers) {
  for (const ExpertsSpec& spec : layers) {
    for (const Extent& extent : spec.extents) {
      if (!files[extent.file]->open_direct()) return false;
    }
  }
  return true;
}

}  // namespace

ExpertStore::ExpertStore(Backend& backend, IoQueue& io,
                         const std::vector<std::unique_ptr<File>>& files,
                         const std::vector<ExpertsSpec>& layers, const Options& options)
    : io_(io),
      files_(files),
      layers_(layers),
      alignment_(backend.weight_alignment()),
      direct_(options.direct && can_read_direct(files, layers)),
      may_grow_(options.may_grow) {
  int64_t largest = 0, total = 0, most = 0;
  for (const ExpertsSpec& spec : layers_) {
    const int experts = static_cast<int>(spec.extents.size()) / spec.parts();
    for (int expert = 0; expert < experts; ++expert) {
      largest = std::max(largest, layout(spec, expert).bytes);
    }
    layer_base_.push_back(total);
    total += experts;
    most = std::max<int64_t>(most, experts);
  }
  slot_of_.assign(static_cast<size_t>(total), -1);
  // Huge pages and DMA like 2 MiB boundaries; in a cache the rounding would cost slots.
  constexpr int64_t kHugePage = 2 << 20, kPage = 16 << 10;
  const bool huge = largest >= kHugePage && options.cache_bytes == 0;
  stride_ = round_up(largest, huge ? kHugePage : kPage);
  const int64_t wanted = std::max<int64_t>(options.min_slots, options.cache_bytes / stride_);
  slots_.resize(static_cast<size_t>(std::min(total, wanted)));
  slab_ = backend.allocate(Memory::kSlots, static_cast<size_t>(stride_) * slots_.size(),
                           static_cast<size_t>(stride_));
  uses_.assign(static_cast<size_t>(total), 0);
  worth_.assign(slots_.size(), kEmpty);
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

ExpertStore::Layout ExpertStore::layout(const ExpertsSpec& spec, int expert) const {
  Layout result;
  const Extent* extent = &spec.extents[static_cast<size_t>(expert) * spec.parts()];
  for (int part = 0; part < spec.parts(); ++part, ++extent) {
    // A direct read begins and ends at whole units, in the file and in the slot, where a part then
    // lies as aligned as in the file. If that is not enough for kernels, the page cache reads it.
    const bool direct = direct_ && (File::kDirectUnit == 1 || extent->offset % alignment_ == 0);
    const int64_t unit = direct ? File::kDirectUnit : 1;
    const int64_t begin = round_down(extent->offset, unit);
    const int64_t end = extent->offset + extent->length;
    Piece* last = result.pieces.empty() ? nullptr : &result.pieces.back();
    // Neighbours in the file are one read, where the next part then lies as it should.
    const int64_t gap = last ? begin - (last->offset + last->length) : -1;
    if (last && last->file == extent->file && last->direct == direct &&
        extent->offset >= last->offset && gap <= kMaxGap &&
        (extent->offset - last->offset + last->slot_offset) % alignment_ == 0) {
      last->length = std::max(last->length, end - last->offset);
    } else {
      const int64_t slot_offset = round_up(result.bytes, std::max(unit, alignment_));
      result.pieces.push_back({extent->file, begin, end - begin, slot_offset, direct});
      last = &result.pieces.back();
    }
    result.parts[part] = last->slot_offset + extent->offset - last->offset;
    result.bytes = last->slot_offset + round_up(last->length, unit);
  }
  return result;
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
  const auto& spec = layers_[layer];
  const int experts = static_cast<int>(spec.extents.size()) / spec.parts();
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
  if (!may_grow_(more * stride_)) {
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
  const Layout expert_layout = layout(layers_[layer], expert);
  std::vector<IoQueue::Task> reads;
  for (const Piece& piece : expert_layout.pieces) {
    reads.emplace_back([this, index, piece] { read(index, piece); });
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
  slot.landed = false;
  slot.purpose = ahead ? Purpose::kAhead : Purpose::kAsked;
  slot.was_read = ahead;
  slot_of(layer, expert) = index;
  slot.parts = expert_layout.parts;
  ++in_flight_;
  if (ahead) {
    ahead_.push_back(index);
  } else {
    ++wanted_;
  }
  return true;
}

void ExpertStore::read(int slot, const Piece& piece) {
  std::exception_ptr failure;
  int64_t cached = 0;
  Stopwatch watch;
  try {
    std::byte* const to = memory(slot) + piece.slot_offset;
    const File& file = *files_[piece.file];
    if (piece.direct) {
      file.read_direct(piece.offset, piece.length, to);
    } else {
      cached = file.read(piece.offset, piece.length, to);
      // What a slot keeps is not kept twice.
      if (direct_) file.forget(piece.offset, piece.length);
    }
  } catch (...) {
    failure = std::current_exception();
  }
  const double elapsed = watch.lap();
  std::lock_guard lock(mutex_);
  if (failure) slots_[slot].failure = failure;
  statistics_.reads += 1;
  statistics_.bytes_read += piece.length;
  if (cached < 0) statistics_.bytes_cached = -1;
  if (statistics_.bytes_cached >= 0) statistics_.bytes_cached += cached;
  statistics_.read_seconds += elapsed;
  if (--slots_[slot].reads_left == 0) {
    landed_.push_back(slot);
    landed_wake_.notify_one();
  }
}

ExpertStore::Arrived ExpertStore::arrived(int slot) const {
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
