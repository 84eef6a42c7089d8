// A device with memory of its own, made of the CPU backend: nobody reaches its states and slots but
// operations and copies, while they run; a host that does ends. Reads land beside the slots.
// Included at the end of backend/cpu/cpu_backend.cpp by tests/metal/test_apart.py.
#pragma once

#include <sys/mman.h>

#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "backend/backend.h"

namespace flashmoe {

class ApartBackend final : public Backend {
 public:
  explicit ApartBackend(std::unique_ptr<Backend> cpu) : cpu_(std::move(cpu)) {}

  Buffer allocate(Memory memory, size_t bytes, size_t unit) override {
    if (memory != Memory::kState && memory != Memory::kSlots) {
      return cpu_->allocate(memory, bytes, unit);
    }
    void* base = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const std::lock_guard lock(mutex_);
    regions_[base] = bytes;
    return Buffer(static_cast<std::byte*>(base), [this](std::byte* data) {
      const std::lock_guard lock(mutex_);
      ::munmap(data, regions_.at(data));
      regions_.erase(data);
    });
  }
  Buffer map(const File&, int64_t, int64_t) override { return nullptr; }
  Buffer allocate_landing(size_t bytes) override { return allocate_pages(bytes); }
  void copy(std::byte* to, const std::byte* from, size_t bytes) override {
    const Open open(*this);
    if (!apart(to) && !apart(from)) throw std::logic_error("a copy from host to host");
    std::memcpy(to, from, bytes);
  }

  void embed(const Matrix& table, std::span<const int32_t> ids, float* out) override {
    const Open open(*this);
    cpu_->embed(table, ids, out);
  }
  void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                float* out) override {
    const Open open(*this);
    cpu_->rms_norm(n, width, x, weight, eps, out);
  }
  void matmul(int n, const float* x, std::span<const Product> products) override {
    const Open open(*this);
    cpu_->matmul(n, x, products);
  }
  void causal_conv(int n, const ConvCall& call) override {
    const Open open(*this);
    cpu_->causal_conv(n, call);
  }
  void gated_delta(int n, const DeltaCall& call) override {
    const Open open(*this);
    cpu_->gated_delta(n, call);
  }
  void attention(int n, const AttentionCall& call) override {
    const Open open(*this);
    cpu_->attention(n, call);
  }
  void route(int n, const RouteCall& call) override {
    const Open open(*this);
    cpu_->route(n, call);
  }
  void all_finite(int n, int width, const float* x, int32_t* finite) override {
    const Open open(*this);
    cpu_->all_finite(n, width, x, finite);
  }
  void experts(int n, const float* x, std::span<const ExpertCall> calls) override {
    const Open open(*this);
    cpu_->experts(n, x, calls);
  }
  void combine(int n, const CombineCall& call) override {
    const Open open(*this);
    cpu_->combine(n, call);
  }
  void finish() override { cpu_->finish(); }
  void stop() override { cpu_->stop(); }

 private:
  // While it lives the memory can be reached.
  class Open {
   public:
    explicit Open(ApartBackend& self) : self_(self), lock_(self.mutex_) {
      protect(PROT_READ | PROT_WRITE);
    }
    ~Open() { protect(PROT_NONE); }

   private:
    void protect(int access) {
      for (const auto& [base, bytes] : self_.regions_) ::mprotect(base, bytes, access);
    }
    ApartBackend& self_;
    const std::lock_guard<std::mutex> lock_;
  };

  bool apart(const std::byte* data) const {
    const auto after = regions_.upper_bound(const_cast<std::byte*>(data));
    if (after == regions_.begin()) return false;
    const auto& [base, bytes] = *std::prev(after);
    return data < static_cast<std::byte*>(base) + bytes;
  }

  std::unique_ptr<Backend> cpu_;
  std::mutex mutex_;  // a State may be freed by any thread
  std::map<void*, size_t> regions_;
};

std::unique_ptr<Backend> make_apart(std::unique_ptr<Backend> cpu) {
  return std::make_unique<ApartBackend>(std::move(cpu));
}

}  // namespace flashmoe
