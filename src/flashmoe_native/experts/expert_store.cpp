#include "experts/expert_store.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "core/finite.h"

namespace flashmoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

const Format* formats(const ExpertsSpec& spec, int matrix) {
  const Format* all[] = {&spec.gate, &spec.up, &spec.down};
  return all[matrix];
}

int64_t slot_bytes_of(const ExpertsSpec& spec) {
  int64_t bytes = 0;
  for (int matrix = 0; matrix < 3; ++matrix) {
    const Format& format = *formats(spec, matrix);
    for (int part = 0; part < format.parts(); ++part) {
      bytes = round_up(bytes, kPartAlignment) + format.part_bytes(part);
    }
  }
  return bytes;
}

Matrix matrix_at(const Format& format, const std::byte* base, int64_t& offset) {
  const std::byte* parts[3] = {};
  for (int part = 0; part < format.parts(); ++part) {
    offset = round_up(offset, kPartAlignment);
    parts[part] = base + offset;
    offset += format.part_bytes(part);
  }
  return {format.rows,  format.cols, format.dtype, format.bits,
          format.group, parts[0],    parts[1],     parts[2]};
}

}  // namespace

ExpertStore::ExpertStore(Backend& backend, IoQueue& io,
                         const std::vector<std::unique_ptr<File>>& files,
                         const std::vector<ExpertsSpec>& layers, int min_slots, int64_t cache_bytes)
    : io_(io), files_(files), layers_(layers), slab_(nullptr, [](std::byte*) {}) {
  int64_t largest = 0, total = 0;
  for (const ExpertsSpec& spec : layers_) {
    layer_base_.push_back(total);
    total += static_cast<int64_t>(spec.extents.size()) / spec.parts();
    largest = std::max(largest, slot_bytes_of(spec));
  }
  slot_of_.assign(static_cast<size_t>(total), -1);
  // Huge pages and DMA like 2 MiB boundaries; a small expert would waste most of one.
  constexpr int64_t kHugePage = 2 << 20, kPage = 16 << 10;
  stride_ = round_up(largest, largest >= kHugePage ? kHugePage : kPage);
  const int64_t wanted = std::max<int64_t>(min_slots, cache_bytes / stride_);
  slots_.resize(static_cast<size_t>(std::min(total, wanted)));
  slab_ = backend.allocate(static_cast<size_t>(slot_bytes()));
  for (int slot = 0; slot < static_cast<int>(slots_.size()); ++slot) {
    slots_[slot].lru = lru_.insert(lru_.end(), slot);
  }
}

ExpertStore::~ExpertStore() {
  cancel();
}

void ExpertStore::pin(int slot) {
  lru_.erase(slots_[slot].lru);
}

void ExpertStore::unpin(int slot) {
  slots_[slot].lru = lru_.insert(lru_.end(), slot);
}

void ExpertStore::forget(int slot) {
  if (slots_[slot].expert >= 0) slot_of(slots_[slot].layer, slots_[slot].expert) = -1;
  slots_[slot].layer = slots_[slot].expert = -1;
}

std::vector<ExpertStore::Piece> ExpertStore::pieces(const ExpertsSpec& spec, int expert) const {
  std::vector<Piece> result;
  const Extent* extent = &spec.extents[static_cast<size_t>(expert) * spec.parts()];
  int64_t slot_offset = 0;
  for (int part = 0; part < spec.parts(); ++part, ++extent) {
    slot_offset = round_up(slot_offset, kPartAlignment);
    if (!result.empty()) {
      // Neighbours in the file at the distance that they have in the slot are one read.
      Piece& last = result.back();
      if (last.file == extent->file &&
          extent->offset - last.offset == slot_offset - last.slot_offset) {
        last.length = extent->offset + extent->length - last.offset;
        slot_offset += extent->length;
        continue;
      }
    }
    result.push_back({extent->file, extent->offset, extent->length, slot_offset});
    slot_offset += extent->length;
  }
  return result;
}

void ExpertStore::start(int layer, std::span<const int32_t> experts) {
  layer_ = layer;
  backlog_.clear();
  backlog_at_ = 0;
  int64_t hits = 0;
  for (const int32_t expert : experts) {
    const int slot = slot_of(layer, expert);
    if (slot < 0) {
      backlog_.push_back(expert);
      continue;
    }
    pin(slot);
    ready_.push_back(slot);
    ++hits;
  }
  {
    std::lock_guard lock(mutex_);
    statistics_.hits += hits;
    statistics_.misses += static_cast<int64_t>(backlog_.size());
  }
  read_backlog();
}

void ExpertStore::read_backlog() {
  while (backlog_at_ < backlog_.size() && try_read(backlog_[backlog_at_])) ++backlog_at_;
}

bool ExpertStore::try_read(int expert) {
  if (lru_.empty()) return false;
  const int slot = lru_.front();
  pin(slot);
  forget(slot);
  slots_[slot].layer = layer_;
  slots_[slot].expert = expert;
  slot_of(layer_, expert) = slot;
  const std::vector<Piece> parts = pieces(layers_[layer_], expert);
  slots_[slot].reads_left = static_cast<int>(parts.size());  // no read of it is under way yet
  slots_[slot].error.clear();
  ++in_flight_;
  for (const Piece& piece : parts) io_.submit([this, slot, piece] { read(slot, piece); });
  return true;
}

void ExpertStore::read(int slot, const Piece& piece) {
  std::string error;
  int64_t cached = 0;
  const auto start = Clock::now();
  try {
    cached = files_[piece.file]->read(piece.offset, piece.length, memory(slot) + piece.slot_offset);
  } catch (const ReadError& caught) {
    error = caught.what();
  }
  const double elapsed = seconds_since(start);
  std::lock_guard lock(mutex_);
  if (!error.empty()) slots_[slot].error = error;
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
  int64_t offset = 0;
  result.gate = matrix_at(spec.gate, memory(slot), offset);
  result.up = matrix_at(spec.up, memory(slot), offset);
  result.down = matrix_at(spec.down, memory(slot), offset);
  return result;
}

std::span<const ExpertStore::Arrived> ExpertStore::next(const std::function<void()>& check) {
  if (in_flight_ > 0 && ready_.empty()) {
    std::unique_lock lock(mutex_);
    const auto start = Clock::now();
    while (!landed_wake_.wait_for(lock, std::chrono::milliseconds(50),
                                  [&] { return !landed_.empty(); })) {
      lock.unlock();
      check();
      lock.lock();
    }
    statistics_.wait_seconds += seconds_since(start);
  }
  return take_landed();
}

std::span<const ExpertStore::Arrived> ExpertStore::ready() {
  return take_landed();
}

std::span<const ExpertStore::Arrived> ExpertStore::take_landed() {
  std::string error;
  if (in_flight_ > 0) {
    std::lock_guard lock(mutex_);
    for (const int slot : landed_) {
      --in_flight_;
      ready_.push_back(slot);
      if (slots_[slot].error.empty()) continue;
      error = slots_[slot].error;
      forget(slot);
    }
    landed_.clear();
  }
  if (!error.empty()) {
    cancel();
    throw ReadError(error);
  }
  arrived_.clear();
  for (const int slot : ready_) arrived_.push_back(arrived(slot));
  given_.insert(given_.end(), ready_.begin(), ready_.end());
  ready_.clear();
  return arrived_;
}

void ExpertStore::release() {
  for (const int slot : given_) unpin(slot);
  given_.clear();
  read_backlog();
}

void ExpertStore::cancel() {
  backlog_.clear();
  backlog_at_ = 0;
  while (in_flight_ > 0) {
    std::unique_lock lock(mutex_);
    landed_wake_.wait(lock, [&] { return !landed_.empty(); });
    for (const int slot : landed_) {
      --in_flight_;
      ready_.push_back(slot);
      if (!slots_[slot].error.empty()) forget(slot);
    }
    landed_.clear();
  }
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
