// Norms, activations, the causal convolution and the sum of the experts.
#pragma once

#include "backend/cpu/simd.inl"

void rms_norm(int width, const float* x, const float* weight, float eps, float* out) {
  Floats squares = {};
  for (int i = 0; i < width; i += kLanes) {
    const Floats value = load(x + i, width - i);
    squares = multiply_add(value, value, squares);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
  for (int i = 0; i < width; i += kLanes) {
    const int count = width - i;
    store(out + i, load(x + i, count) * scale * load(weight + i, count), count);
  }
}

void swiglu(int count, float* gate, const float* up) {
  for (int i = 0; i < count; i += kLanes) {
    store(gate + i, silu(load(gate + i, count - i)) * load(up + i, count - i), count - i);
  }
}

void causal_conv(int n, const ConvCall& call, int begin, int end) {
  const int taps = call.kernel;
  const ptrdiff_t channels = call.channels;
  Floats weight[kMaxConvKernel],
      window[kMaxConvKernel];  // window: the last `taps` inputs, oldest first
  constexpr int kAhead =
      256;  // channels; each row of them is too short for the hardware to foresee
  for (int c = begin; c < end; c += kLanes) {
    const int count = end - c;
    for (int k = 0; k < taps; ++k) {
      __builtin_prefetch(call.weight + k * channels + c + kAhead);
      weight[k] = load(call.weight + k * channels + c, count);
    }
    for (int k = 0; k + 1 < taps; ++k) {
      __builtin_prefetch(call.state_in + k * channels + c + kAhead);
      window[k + 1] = load(call.state_in + k * channels + c, count);
    }
    for (int t = 0; t < n; ++t) {
      float* x = call.x + t * channels + c;
      for (int k = 0; k + 1 < taps; ++k) window[k] = window[k + 1];
      window[taps - 1] = load(x, count);
      Floats y = weight[0] * window[0];
      for (int k = 1; k < taps; ++k) y = multiply_add(weight[k], window[k], y);
      store(x, silu(y), count);
    }
    for (int k = 0; k + 1 < taps; ++k) {
      store(call.state_out + k * channels + c, window[k + 1], count);
    }
  }
}

void combine(const CombineCall& call, int token, int begin, int end) {
  const ptrdiff_t hidden = call.hidden;
  const float* expert_out = call.expert_out + token * call.experts_per_token * hidden;
  const float* weights =
      call.expert_weights + static_cast<ptrdiff_t>(token) * call.experts_per_token;
  const float* shared = call.shared_out + token * hidden;
  const Floats shared_weight = sigmoid(splat(call.shared_gate[token]));
  float* x = call.x + token * hidden;
  for (int i = begin; i < end; i += kLanes) {
    const int count = end - i;
    Floats total = load(x + i, count);
    for (int j = 0; j < call.experts_per_token; ++j) {
      total = multiply_add(splat(weights[j]), load(expert_out + j * hidden + i, count), total);
    }
    store(x + i, multiply_add(shared_weight, load(shared + i, count), total), count);
  }
}
