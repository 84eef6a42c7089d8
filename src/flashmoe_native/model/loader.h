// Reads resident tensors into the backend's memory, many at a time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/file.h"
#include "core/io_queue.h"
#include "core/spec.h"
#include "model/placement.h"
#include "model/weights.h"

namespace flashmoe {

// Called with (bytes read, bytes in all) while loading; may throw to stop.
using Progress = std::function<void(int64_t, int64_t)>;

class Loader final : public WeightSource {
 public:
  Loader(Backend& backend, const WeightRules& rules, IoQueue& io,
         const std::vector<std::unique_ptr<File>>& files, const CheckpointSpec& spec);
  // Waits for reads under way.
  ~Loader() override;

  // Room for it; its bytes are there after finish().
  Matrix matrix(const std::string& name) override;
  // There at once. Throw CheckpointError where a value is not finite.
  const float* vector(const std::string& name) override;
  const float* taps(const std::string& name, int channels, int kernel) override;

  // Waits until every matrix is there; throws ReadError, or CheckpointError where an element, scale
  // or bias is not finite. Gives the memory that all weights lie in.
  std::vector<Buffer> finish(const Progress& progress);

  const Placement& placement() const { return placement_; }

 private:
  struct Part {
    const std::string* name;
    std::string file;
    const std::byte* data;
    int64_t length;
    DType dtype;
  };

  // Where a tensor's bytes are, or will be after finish().
  std::byte* place(const std::vector<Extent>& extents, int64_t length);
  // The memory of a place, which it gets where it is new; null where it cannot be mapped.
  std::byte* address(const Placement::Place& place);
  std::vector<float> floats(const std::string& name);
  const float* keep(const std::vector<float>& values);
  void read(const std::vector<Extent>& extents, std::byte* to);
  // Reads into `to`, or where that is null only so that the page cache has the bytes.
  void submit(const File& file, int64_t offset, int64_t length, std::byte* to);

  Backend& backend_;
  IoQueue& io_;
  const std::vector<std::unique_ptr<File>>& files_;
  Placement placement_;
  std::vector<Buffer> buffers_;  // of placement_'s pieces
  std::vector<Part> to_check_;

  std::mutex mutex_;
  std::condition_variable done_wake_;
  int64_t submitted_ = 0;       // bytes, by the thread that loads
  int64_t done_ = 0;            // bytes; under mutex_
  std::exception_ptr failure_;  // of a read; under mutex_
};

}  // namespace flashmoe
