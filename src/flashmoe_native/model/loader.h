// Reads resident tensors into the backend's memory, many at a time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/file.h"
#include "core/io_queue.h"
#include "core/spec.h"
#include "model/weights.h"

namespace flashmoe {

class Loader {
 public:
  Loader(Backend& backend, IoQueue& io, const std::vector<std::unique_ptr<File>>& files,
         const CheckpointSpec& spec);
  // Waits for reads under way.
  ~Loader();

  // Room for a tensor, whose bytes are there after finish().
  Matrix matrix(const std::string& name);
  // A tensor as float32, there at once. Throws CheckpointError where a value is not finite.
  const float* vector(const std::string& name);
  // A depthwise convolution [channels, kernel] as [kernel, channels].
  const float* taps(const std::string& name, int channels, int kernel);
  bool has_matrix(const std::string& name) const { return spec_.matrices.contains(name); }

  // Waits until every matrix is there; throws ReadError, or CheckpointError where an element, scale
  // or bias is not finite.
  void finish(const Progress& progress);

  int64_t bytes() const { return bytes_; }
  bool mapped() const { return mapped_; }
  std::vector<Buffer> take_buffers() { return std::move(buffers_); }

 private:
  struct Part {
    const std::string* name;
    std::string file;
    const std::byte* data;
    int64_t length;
    DType dtype;
  };

  // Neighbours in a file, mapped together.
  struct Run {
    int64_t begin, end;
    std::byte* data = nullptr;
    bool tried = false;
  };

  // The runs of tensors that may be used where they lie in their files.
  void find_runs();
  // Where such a tensor is, or null.
  std::byte* map(const Extent& extent);
  // Where a tensor's bytes are, or will be after finish().
  std::byte* place(const std::vector<Extent>& extents, int64_t length);
  std::byte* allocate(int64_t length);
  std::vector<float> floats(const std::string& name);
  const float* keep(const std::vector<float>& values);
  void read(const std::vector<Extent>& extents, std::byte* to);
  // Reads into `to`, or where that is null only so that the page cache has the bytes.
  void submit(const File& file, int64_t offset, int64_t length, std::byte* to);

  Backend& backend_;
  IoQueue& io_;
  const std::vector<std::unique_ptr<File>>& files_;
  const CheckpointSpec& spec_;
  std::vector<Buffer> buffers_;
  std::map<int, std::vector<Run>> runs_;  // by file, in order
  bool mapped_ = false;
  std::byte* block_ = nullptr;  // what is left of a block that small tensors share
  int64_t block_left_ = 0;
  int64_t bytes_ = 0;
  std::vector<Part> to_check_;

  std::mutex mutex_;
  std::condition_variable done_wake_;
  int64_t submitted_ = 0;       // bytes, by the thread that loads
  int64_t done_ = 0;            // bytes; under mutex_
  std::exception_ptr failure_;  // of a read; under mutex_
};

}  // namespace flashmoe
