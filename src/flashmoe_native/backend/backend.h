// What the forward pass asks of a device: about a dozen operations, and memory that host and device
// both see. Operations take effect in the order they are called; their results may be read on the
// host after finish(). Activations are float32, row-major, one row a token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/file.h"
#include "core/memory.h"
#include "core/spec.h"

namespace flashmoe {

// A weight of shape [rows, cols], rows being outputs; y = W x. Dense, or affine-quantized in MLX's
// format: bits-wide unsigned q in uint32 words, low end first, w = q * scale + bias for each group
// of `group` columns. The three pointers are aligned as WeightRules say.
struct Matrix {
  int rows = 0;
  int cols = 0;
  DType dtype = DType::F32;  // of the elements, or of scales and biases where quantized
  int bits = 0;              // 0: dense; else 2, 4 or 8
  int group = 0;             // 32, 64 or 128
  const std::byte* weight = nullptr;
  const std::byte* scales = nullptr;  // [rows, cols / group]
  const std::byte* biases = nullptr;  // [rows, cols / group]
};

// A matrix whose weight (and scales and biases) begin at `parts`.
inline Matrix make_matrix(const Format& format, const std::byte* const (&parts)[3]) {
  return {format.rows,  format.cols, format.dtype, format.bits,
          format.group, parts[0],    parts[1],     parts[2]};
}

// out[t, row] = weight · x[t], or added to what out holds; out is [n, weight->rows].
struct Product {
  const Matrix* weight;
  float* out;
  bool add = false;
};

// out[out_rows[i]] = down(silu(gate x) * up x) with x = row tokens[i] of the input; out rows are
// hidden wide.
struct ExpertCall {
  Matrix gate, up, down;
  std::span<const int32_t> tokens;
  std::span<const int32_t> out_rows;
  float* out;
};

struct ConvCall {
  int channels;
  int kernel;
  const float* weight;    // [kernel, channels], oldest tap first
  const float* state_in;  // [kernel - 1, channels], oldest first
  float* state_out;       // likewise, after the last token; never aliases state_in
  float* x;               // [n, channels], replaced by silu(conv(x))
};

// The gated delta rule, then norm_gated, per token and value head h with key head h / (Hv / Hk):
//   q, k = l2norm(q) * Dk^-0.5, l2norm(k); beta = sigmoid(b); g = -exp(A_log) softplus(a + dt_bias)
//   S *= exp(g); d = beta (v - S^T k); S += k d^T; o = S^T q; out = norm * rms(o) * silu(z)
struct DeltaCall {
  int key_heads, value_heads, key_dim, value_dim;
  float norm_eps;
  const float* a_log;     // [value_heads]
  const float* dt_bias;   // [value_heads]
  const float* norm;      // [value_dim]
  const float* qkv;       // [n, 2 * key_heads * key_dim + value_heads * value_dim], convolved
  const float* z;         // [n, value_heads * value_dim]
  const float* a;         // [n, value_heads]
  const float* b;         // [n, value_heads]
  const float* state_in;  // [value_heads, key_dim, value_dim]
  float* state_out;       // likewise; never aliases state_in
  float* out;             // [n, value_heads * value_dim]
};

// Causal attention of n tokens at `position`, whose keys and values join the cache first.
struct AttentionCall {
  int heads, kv_heads, head_dim, rotary_dim;
  float rope_theta, norm_eps;
  const float* q_norm;  // [head_dim]
  const float* k_norm;  // [head_dim]
  const float* q_gate;  // [n, heads, 2 * head_dim]: per head the query, then the output's gate
  const float* k;       // [n, kv_heads, head_dim], before norm and RoPE
  const float* v;       // [n, kv_heads, head_dim]
  int64_t position;     // tokens already in the cache
  int64_t capacity;     // of the cache, at least position + n
  DType cache_dtype;    // F32 or BF16
  std::byte* keys;      // [kv_heads, capacity, head_dim], after norm and RoPE
  std::byte* values;    // [kv_heads, capacity, head_dim]
  float* out;           // [n, heads * head_dim], times sigmoid(gate)
};

struct CombineCall {
  int hidden;
  int experts_per_token;
  const float* expert_out;      // [n, experts_per_token, hidden]: token by token, expert by expert
  const float* expert_weights;  // [n, experts_per_token]
  const float* shared_out;      // [n, hidden]
  const float* shared_gate;     // [n], before its sigmoid
  float* x;                     // [n, hidden], added to in the order j = 0, 1, ..., then shared
  const float* norm_weight = nullptr;  // [hidden]: normed = rms_norm(x) follows; null: nothing does
  float norm_eps = 0;
  float* normed = nullptr;  // [n, hidden]
};

struct RouteCall {
  int experts, experts_per_token;
  bool renormalise;
  const float* logits;  // [n, experts]
  int hidden;
  const float* x;   // [n, hidden]: the residual stream that the logits come of
  int32_t* ids;     // [n, experts_per_token]
  float* weights;   // likewise
  int32_t* finite;  // [n]: 0 where a logit or an element of x is infinite or NaN, else 1
};

// What memory is for, which tells a backend where to have it. The host writes weights, and slots
// where nothing is landed beside them, and reads and writes what it exchanges with the device;
// states it only copies, by Backend::copy().
enum class Memory { kWeights, kSlots, kState, kExchange };

// What a model asks of kernels.
struct Shapes {
  int conv_taps, key_dim, value_dim;  // of GatedDeltaNet
  int head_dim;                       // of attention
  int experts, experts_per_token;
};

// How a device was last waited for, in seconds of the host's clock; all 0 where the host computes.
struct DeviceTimes {
  double committed = 0;  // the first command buffer of a finish(), by the host
  double began = 0;      // the device, that one
  double ended = 0;      // the device, the last one
  double woken = 0;      // the host
};

// What a backend asks of weights in memory, known before there is one.
struct WeightRules {
  int alignment;  // bytes; a power of two, at most 4096
  bool maps;      // can use them where they lie in a file, as aligned as that
};

class Backend {
 public:
  virtual ~Backend() = default;
  // What its threads have spent on operations so far, all together; 0 where a device computes.
  virtual double busy_seconds() const { return 0; }
  // Memory that its operations have come to work in so far, besides what they are given; 0 where a
  // device computes.
  virtual int64_t scratch_bytes() const { return 0; }
  // Throws DeviceError where there is no kernel for a model; asked before anything is loaded.
  virtual void require(const Shapes&) const {}
  // Page-aligned, 2 MiB-aligned when at least as large, zeroed; freed with the backend still alive.
  // Slots are units of so many bytes, which an operation never reaches across.
  virtual Buffer allocate(Memory memory, size_t bytes, size_t unit = 0) = 0;
  // Memory that holds `length` bytes of the file from `offset` on without a copy, where WeightRules
  // say that it can; empty where the device cannot after all. Only to be read.
  virtual Buffer map(const File& file, int64_t offset, int64_t length) = 0;
  // Memory beside so many bytes of slots, for reads to land in, from where copy() brings an expert
  // to its slot; empty where reads land in the slots.
  virtual Buffer allocate_landing(size_t) { return nullptr; }
  // Copies between states, between a state and memory of the host, or from where reads land to
  // slots; done when it returns. A thread may do so beside operations that use neither.
  virtual void copy(std::byte* to, const std::byte* from, size_t bytes) {
    std::memcpy(to, from, bytes);
  }

  virtual void embed(const Matrix& table, std::span<const int32_t> ids, float* out) = 0;
  virtual void rms_norm(int n, int width, const float* x, const float* weight, float eps,
                        float* out) = 0;
  // One input for several matrices, so that it is read (and quantized) once. x is [n, cols].
  virtual void matmul(int n, const float* x, std::span<const Product> products) = 0;
  virtual void causal_conv(int n, const ConvCall& call) = 0;
  virtual void gated_delta(int n, const DeltaCall& call) = 0;
  virtual void attention(int n, const AttentionCall& call) = 0;
  // Softmax over all `experts` logits, the largest of them (ties: lower index first) in falling
  // order, weights divided by their sum if `renormalise`.
  virtual void route(int n, const RouteCall& call) = 0;
  // finite[t] = 1 if all of x[t], which is `width` wide, are finite, else 0.
  virtual void all_finite(int n, int width, const float* x, int32_t* finite) = 0;
  // x is [n, hidden]. The calls' outputs do not overlap.
  virtual void experts(int n, const float* x, std::span<const ExpertCall> calls) = 0;
  virtual void combine(int n, const CombineCall& call) = 0;
  // Returns when everything asked for so far is done.
  virtual void finish() = 0;
  // Ends its threads: from now on only memory is asked for.
  virtual void stop() {}

  // Of the latest finish().
  virtual DeviceTimes times() const { return {}; }
  // The kernels that were compiled so far, each with what it was specialised for. None for the CPU.
  virtual std::vector<std::string> compiled() const { return {}; }
  // What the device is, for people: names and values. Nothing for the CPU.
  virtual std::vector<std::pair<std::string, std::string>> describe() const { return {}; }
};

}  // namespace flashmoe
