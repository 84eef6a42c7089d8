// Where each expert lies, the reads that bring it, and the slots they land in.
//
// A layer's experts are asked for together (start) and handed out as they land (ready, next), so
// that the first is computed while the others are still being read. Slots keep what they hold until
// they are needed for another expert: with more slots than a layer needs, they are a cache. The
// expert whose uses are fewest leaves first, where a use counts half after every kHalfLife tokens:
// that reads a fifth less than least recently used (docs/performance.md). One thread uses a store.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/file.h"
#include "core/io_queue.h"
#include "core/spec.h"
#include "experts/slots.h"

namespace flashmoe {

class ExpertStore {
 public:
  struct Arrived {
    int expert;
    Matrix gate, up, down;
  };

  struct Statistics {
    int64_t reads = 0;
    int64_t bytes_read = 0;
    int64_t bytes_cached = 0;  // of them in the page cache; -1 where the system cannot tell
    int64_t hits = 0;          // experts asked for that were in a slot
    int64_t misses = 0;
    double read_seconds = 0;  // summed over reads, which overlap
    double wait_seconds = 0;  // that next() waited
  };

  // Files and specs must outlive the store. may_grow is asked whenever slots beyond the least are
  // to be used for the first time: whether the machine can still spare so many bytes. Once it
  // cannot, the cache stays as large as it is. Memory is granted as it is first touched, so that
  // what others take meanwhile counts. Empty: always.
  ExpertStore(Backend& backend, IoQueue& io, const std::vector<std::unique_ptr<File>>& files,
              const std::vector<ExpertsSpec>& layers, const SlotOptions& options,
              std::function<bool(int64_t bytes)> may_grow);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  // Starts reading what is not in a slot. `experts` are distinct, uses[i] is the number of tokens
  // that need experts[i]; `then_next` says that the next layer will need nearly all of its own,
  // which are read behind these, as by read_ahead(). Only when all of the last start() was given
  // and computed, or cancelled.
  void start(int layer, std::span<const int32_t> experts, std::span<const int32_t> uses,
             bool then_next);
  // Those that were in a slot, to begin with: perhaps none.
  std::span<const Arrived> ready();
  // Those that have landed since: at least one, or none when all were given. Where reads wait for a
  // slot, `finish` is called first, after which all that was given is computed and its slots are
  // free. `check` is called now and then while waiting and may throw. Throws ReadError.
  std::span<const Arrived> next(const std::function<void()>& finish,
                                const std::function<void()>& check);
  // All experts of the layer that start() will be called for next will probably be needed: reads
  // them, as far as slots reach, behind what is being read, and keeps them until that start().
  void read_ahead(int layer);
  // So many tokens have gone through all layers, and everything given was computed: earlier uses
  // count for less.
  void end_pass(int tokens);
  // Forgets the rest of start(), once reads under way have landed; what was given is not needed.
  void cancel();

  // Searches stored experts for an element, scale or bias that is infinite or NaN; says which file
  // and expert has one, or nothing. Throws ReadError.
  std::string find_not_finite(int layer, std::span<const int32_t> experts) const;

  Statistics statistics() const;
  int64_t slot_bytes() const { return size_.stride * open_; }

 private:
  // Why a slot is pinned: start() asked for it, or read_ahead() did, or that turned out in vain.
  enum class Purpose { kAsked, kAhead, kVain };

  struct Slot {
    int layer = -1, expert = -1;  // -1: empty
    bool landed = true;           // no read of it is under way
    bool placed = true;           // is in slab_, where it may have to be brought
    Purpose purpose = Purpose::kAsked;
    bool was_read = false;                 // ahead: was in no slot before
    int reads_left = 0;                    // under mutex_
    std::exception_ptr failure;            // of a read; under mutex_
    std::array<int64_t, kMaxParts> parts;  // where they begin in the slot
  };

  std::byte* memory(int slot) const { return slab_.get() + size_.stride * slot; }
  std::byte* landing_place(int slot) const {
    return landing_ ? landing_.get() + size_.stride * slot : memory(slot);
  }
  int64_t index(int layer, int expert) const { return layer_base_[layer] + expert; }
  int& slot_of(int layer, int expert) { return slot_of_[index(layer, expert)]; }
  int choose_slot();
  bool open_more();
  bool try_read(int layer, int expert, bool ahead);
  void read_backlog();
  // Whether reads wait for a slot.
  bool starved() const { return backlog_at_ < backlog_.size(); }
  void read_next_layer();
  // What was given is no longer needed.
  void release();
  void absorb_landed();
  std::exception_ptr take_landed();
  void read(int slot, const SlotLayout::Read& part);
  void pin(int slot);
  void unpin(int slot);
  void forget(int slot);
  Arrived arrived(int slot);

  Backend& backend_;
  IoQueue& io_;
  const std::vector<std::unique_ptr<File>>& files_;
  const std::vector<ExpertsSpec>& layers_;
  const SlotOptions options_;
  const Slots size_;
  std::vector<int64_t> layer_base_;
  std::vector<int> slot_of_;  // by index(); -1: in no slot
  std::vector<float> uses_;   // by index(), each use times what weight_ was then
  float weight_ = 1;          // of a use now; doubles every kHalfLife tokens
  std::vector<Slot> slots_;
  Buffer slab_;     // of slots
  Buffer landing_;  // what is read for them lands here, or in the slots if this is empty
  // How much a slot is worth keeping: its expert's uses_, less than any where it is empty,
  // infinitely much where it is pinned.
  std::vector<float> worth_;
  int unpinned_ = 0;  // of the open ones
  int open_ = 0;      // slots that may be used: the first so many
  int step_ = 1;      // slots to open at a time
  std::function<bool(int64_t)> may_grow_;

  int layer_ = 0;
  std::vector<int32_t> backlog_;  // experts that wait for a slot, from backlog_at_ on
  size_t backlog_at_ = 0;
  bool then_next_ = false;  // the next layer's are to be read when nothing waits for a slot
  int in_flight_ = 0;       // slots being read
  int wanted_ = 0;          // of them, those that start() asked for
  std::vector<int> ahead_;  // slots that read_ahead() pinned
  std::vector<int> ready_;
  std::vector<int> given_;
  std::vector<Arrived> arrived_;

  mutable std::mutex mutex_;
  std::condition_variable landed_wake_;
  std::vector<int> landed_;  // slots whose last read is done; under mutex_
  Statistics statistics_;    // under mutex_
};

}  // namespace flashmoe
