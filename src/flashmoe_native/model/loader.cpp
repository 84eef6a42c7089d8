#include "model/loader.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "core/error.h"
#include "core/finite.h"

namespace flashmoe {
namespace {

constexpr int64_t kAlignment = 64;                 // of a tensor: a cache line
constexpr int64_t kSharedBlock = 1 << 20;          // that tensors below a quarter of it share
constexpr int64_t kMaxGap = 1 << 20;               // between tensors that are mapped together
constexpr int64_t kLongestRun = int64_t{4} << 30;  // what is mapped together at most
constexpr int64_t kLongestRead = 8 << 20;          // longer ones are split, to be read in parallel

[[noreturn]] void not_finite(const std::string& file, const std::string& name, int64_t index) {
  throw CheckpointError(file + ": tensor " + name + ": element " + std::to_string(index) +
                        " is infinite or NaN; the file is damaged, download or convert it again");
}

template <typename Specs>
const auto& find(const Specs& specs, const std::string& name) {
  const auto found = specs.find(name);
  if (found == specs.end()) throw CheckpointError("the checkpoint has no tensor " + name);
  return found->second;
}

}  // namespace

Loader::Loader(Backend& backend, IoQueue& io, const std::vector<std::unique_ptr<File>>& files,
               const CheckpointSpec& spec)
    : backend_(backend), io_(io), files_(files), spec_(spec) {
  find_runs();
}

Loader::~Loader() {
  std::unique_lock lock(mutex_);
  done_wake_.wait(lock, [&] { return done_ == submitted_; });
}

void Loader::find_runs() {
  for (const auto& [name, matrix] : spec_.matrices) {
    for (int part = 0; part < matrix.format.parts(); ++part) {
      const std::vector<Extent>& extents = matrix.parts[part];
      if (extents.size() != 1 || extents[0].length <= kSharedBlock / 4 ||
          extents[0].offset % backend_.weight_alignment() != 0) {
        continue;
      }
      runs_[extents[0].file].push_back(
          {.begin = extents[0].offset, .end = extents[0].offset + extents[0].length});
    }
  }
  for (auto& [file, runs] : runs_) {
    std::sort(runs.begin(), runs.end(),
              [](const Run& a, const Run& b) { return a.begin < b.begin; });
    std::vector<Run> merged;
    for (const Run& run : runs) {
      if (!merged.empty() && run.begin - merged.back().end <= kMaxGap &&
          run.end - merged.back().begin <= kLongestRun) {
        merged.back().end = std::max(merged.back().end, run.end);
      } else {
        merged.push_back(run);
      }
    }
    runs = std::move(merged);
  }
}

std::byte* Loader::map(const Extent& extent) {
  if (extent.offset % backend_.weight_alignment() != 0) return nullptr;
  for (Run& run : runs_[extent.file]) {
    if (extent.offset < run.begin || extent.offset + extent.length > run.end) continue;
    const File& file = *files_[extent.file];
    if (!run.tried) {
      run.tried = true;
      Buffer memory = backend_.map(file, run.begin, run.end - run.begin);
      if (!memory) return nullptr;
      run.data = memory.get();
      mapped_ = true;
      buffers_.push_back(std::move(memory));
      // Else the first pass would wait for one page after another.
      for (int64_t at = run.begin; at < run.end; at += kLongestRead) {
        submit(file, at, std::min(kLongestRead, run.end - at), nullptr);
      }
    }
    return run.data ? run.data + (extent.offset - run.begin) : nullptr;
  }
  return nullptr;
}

std::byte* Loader::place(const std::vector<Extent>& extents, int64_t length) {
  if (extents.size() == 1 && length > kSharedBlock / 4) {
    if (std::byte* mapped = map(extents.front())) {
      bytes_ += length;
      return mapped;
    }
  }
  std::byte* to = allocate(length);
  read(extents, to);
  return to;
}

std::byte* Loader::allocate(int64_t length) {
  length = (length + kAlignment - 1) / kAlignment * kAlignment;
  bytes_ += length;
  if (length > kSharedBlock / 4) {
    buffers_.push_back(backend_.allocate(Memory::kWeights, static_cast<size_t>(length)));
    return buffers_.back().get();
  }
  if (length > block_left_) {
    buffers_.push_back(backend_.allocate(Memory::kWeights, kSharedBlock));
    block_ = buffers_.back().get();
    block_left_ = kSharedBlock;
  }
  std::byte* result = block_;
  block_ += length;
  block_left_ -= length;
  return result;
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
             to + at);
    }
    to += extent.length;
  }
}

Matrix Loader::matrix(const std::string& name) {
  const auto& [format, extents] = find(spec_.matrices, name);
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
  const VectorSpec& spec = find(spec_.vectors, name);
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
  std::byte* to = allocate(static_cast<int64_t>(length));
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

void Loader::finish(const Progress& progress) {
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
}

}  // namespace flashmoe
