#include "model/loader.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "core/error.h"
#include "core/finite.h"

namespace flashmoe {
namespace {

constexpr int64_t kLongestRead = 8 << 20;  // longer ones are split, to be read in parallel

[[noreturn]] void not_finite(const std::string& file, const std::string& name, int64_t index) {
  throw CheckpointError(file + ": tensor " + name + ": element " + std::to_string(index) +
                        " is infinite or NaN; the file is damaged, download or convert it again");
}

}  // namespace

Loader::Loader(Backend& backend, const WeightRules& rules, IoQueue& io,
               const std::vector<std::unique_ptr<File>>& files, const CheckpointSpec& spec)
    : WeightSource(spec), backend_(backend), io_(io), files_(files), placement_(spec, rules) {}

Loader::~Loader() {
  std::unique_lock lock(mutex_);
  done_wake_.wait(lock, [&] { return done_ == submitted_; });
}

std::byte* Loader::address(const Placement::Place& place) {
  const auto& [bytes, mapped] = placement_.pieces()[place.piece];
  if (place.piece == buffers_.size()) {
    const auto size = static_cast<size_t>(bytes);
    buffers_.push_back(mapped ? backend_.map(*files_[mapped->file], mapped->offset, bytes)
                              : backend_.allocate(Memory::kWeights, size));
    // Else the first pass would wait for one page after another.
    if (mapped && buffers_.back()) read({*mapped}, nullptr);
  }
  std::byte* const begin = buffers_[place.piece].get();
  return begin ? begin + place.offset : nullptr;
}

std::byte* Loader::place(const std::vector<Extent>& extents, int64_t length) {
  Placement::Place place = placement_.put(length, extents);
  std::byte* to = address(place);
  if (!to) {
    placement_.refuse(place, length);
    place = placement_.put(length, extents);
    to = address(place);
  }
  if (!placement_.pieces()[place.piece].mapped) read(extents, to);
  return to;
}

void Loader::submit(const File& file, int64_t offset, int64_t length, std::byte* to) {
  io_.submit({[this, &file, offset, length, to] {
    std::exception_ptr failure;
    try {
      std::vector<std::byte> unused(to ? 0 : static_cast<size_t>(length));
      file.read(offset, length, to ? to : unused.data());
    } catch (...) {
      failure = std::current_exception();
    }
    std::lock_guard lock(mutex_);
    if (failure) failure_ = failure;
    done_ += length;
    done_wake_.notify_one();
  }});
  submitted_ += length;  // now that it was taken: else nobody would ever report it done
}

void Loader::read(const std::vector<Extent>& extents, std::byte* to) {
  for (const Extent& extent : extents) {
    for (int64_t at = 0; at < extent.length; at += kLongestRead) {
      submit(*files_[extent.file], extent.offset + at, std::min(kLongestRead, extent.length - at),
             to ? to + at : nullptr);
    }
    if (to) to += extent.length;
  }
}

Matrix Loader::matrix(const std::string& name) {
  const auto& [format, extents] = find_matrix(name);
  const std::byte* parts[3] = {};
  for (int part = 0; part < format.parts(); ++part) {
    parts[part] = place(extents[part], format.part_bytes(part));
    if (part > 0 || format.bits == 0) {
      const auto entry = spec_.matrices.find(name);
      to_check_.push_back({&entry->first, files_[extents[part].front().file]->path(), parts[part],
                           format.part_bytes(part), format.dtype});
    }
  }
  return make_matrix(format, parts);
}

std::vector<float> Loader::floats(const std::string& name) {
  const VectorSpec& spec = find_vector(name);
  std::vector<std::byte> raw(static_cast<size_t>(spec.length) * size_of(spec.dtype));
  std::byte* to = raw.data();
  for (const Extent& extent : spec.extents) {
    files_[extent.file]->read(extent.offset, extent.length, to);
    to += extent.length;
  }
  const int64_t bad = first_not_finite(raw.data(), static_cast<int64_t>(raw.size()), spec.dtype);
  if (bad >= 0) not_finite(files_[spec.extents.front().file]->path(), name, bad);
  std::vector<float> result(static_cast<size_t>(spec.length));
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = load_float(raw.data(), spec.dtype, i) + (spec.plus_one ? 1.0f : 0.0f);
  }
  return result;
}

const float* Loader::keep(const std::vector<float>& values) {
  const size_t length = values.size() * sizeof(float);
  std::byte* to = address(placement_.put(static_cast<int64_t>(length)));
  std::memcpy(to, values.data(), length);
  return reinterpret_cast<const float*>(to);
}

const float* Loader::vector(const std::string& name) {
  return keep(floats(name));
}

const float* Loader::taps(const std::string& name, int channels, int kernel) {
  const std::vector<float> stored = floats(name);
  std::vector<float> result(stored.size());
  for (int channel = 0; channel < channels; ++channel) {
    for (int tap = 0; tap < kernel; ++tap) {
      result[static_cast<size_t>(tap) * channels + channel] =
          stored[static_cast<size_t>(channel) * kernel + tap];
    }
  }
  return keep(result);
}

std::vector<Buffer> Loader::finish(const Progress& progress) {
  std::unique_lock lock(mutex_);
  while (!done_wake_.wait_for(lock, std::chrono::milliseconds(100),
                              [&] { return done_ == submitted_; })) {
    const int64_t done = done_, submitted = submitted_;
    lock.unlock();
    progress(done, submitted);
    lock.lock();
  }
  if (failure_) std::rethrow_exception(failure_);
  for (const Part& part : to_check_) {
    const int64_t bad = first_not_finite(part.data, part.length, part.dtype);
    if (bad >= 0) not_finite(part.file, *part.name, bad);
  }
  return std::move(buffers_);
}

}  // namespace flashmoe
