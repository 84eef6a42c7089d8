// The operations of a Backend as plans for a GPU. A host (Metal, or tests) derives from it and says
// where memory lies and how a plan is launched.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/launch/plan.h"

namespace flashmoe {

// Where one way of computing gives over to another.
struct Tuning {
  // Tokens (of an expert: on average) up to which reading a weight once a token is cheapest.
  int decode_tokens = 4;
  // Rows of a dispatch from which a simdgroup takes two quads: more share the work on inputs, fewer
  // simdgroups occupy the GPU.
  int two_quads_rows = 8193;
  int least_keys = 64;      // of a split of attention: fewer are not worth merging
  int enough_groups = 128;  // threadgroups that occupy a whole GPU
  // macOS ends work that keeps the GPU from drawing the screen: a dispatch is sliced that might
  // take longer, and a command buffer is committed when it might.
  double longest_seconds = 0.05;
};

class GpuBackend : public Backend {
 public:
  // With `overlap` experts are launched as soon as they are asked for, beside the reads of others;
  // else all experts of a layer together when they have been read.
  explicit GpuBackend(bool overlap, const Tuning& tuning = {})
      : overlap_(overlap), tuning_(tuning) {}

  void require(const Shapes& shapes) const override;

  void embed(const Matrix& table, std::span<const int32_t> ids, float* out) override;
  void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                float* out) override;
  void matmul(int n, const float* x, std::span<const Product> products) override;
  void causal_conv(int n, const ConvCall& call) override;
  void gated_delta(int n, const DeltaCall& call) override;
  void attention(int n, const AttentionCall& call) override;
  void route(int n, const RouteCall& call) override;
  void all_finite(int n, int width, const float* x, int32_t* finite) override;
  void experts(int n, const float* x, std::span<const ExpertCall> calls) override;
  void combine(int n, const CombineCall& call) override;

 protected:
  // What a dispatch leaves for the next.
  enum class Scratch { kQueries, kPartial, kTotals, kActivations, kCount };

  // Where the GPU finds what a pointer into allocate()'s or map()'s memory points at.
  virtual uint64_t address(const void* pointer) = 0;
  // Memory whose contents later dispatches overwrite.
  virtual uint64_t scratch(Scratch which, size_t bytes) = 0;
  // A copy that stays until finish().
  virtual uint64_t stage(std::span<const int32_t> values) = 0;
  // Launches take effect in order.
  virtual void launch(const Plan& plan) = 0;
  // Lets the GPU begin what was launched.
  virtual void commit() = 0;

  // Launches the experts that wait; before finish().
  void launch_waiting();

  const Tuning& tuning() const { return tuning_; }

 private:
  struct Batch;  // experts of one dispatch

  void run(const Plan& plan);
  void multiply(int n, const float* x, std::span<const Product* const> products);
  void multiply_slice(int first, int n, const float* x, std::span<const Product* const> products);
  bool add(Batch& batch, const ExpertCall& call);
  void launch_batch(const Batch& batch);
  shaders::Stored stored(const Matrix& matrix);
  uint32_t quads(int64_t rows) const { return rows < tuning_.two_quads_rows ? 1 : 2; }

  const bool overlap_;
  const Tuning tuning_;
  std::vector<ExpertCall> waiting_;  // asked for but not launched
  const float* waiting_x_ = nullptr;
};

}  // namespace flashmoe
