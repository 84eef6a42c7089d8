// The vector types of Metal that the kernels use, as plain structs, for compilers that have none.
// Shared by the executor and by benchmarks/metal_on_cuda.
#pragma once

struct uchar4 {
  uchar x, y, z, w;
};
struct alignas(8) uint2 {
  uint x, y;
  uint2() = default;
  uint2(uint x, uint y) : x(x), y(y) {}
};
struct uint3 {
  uint x, y, z;
};
struct alignas(16) uint4 {
  uint x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
  float4() = default;
  explicit float4(float s) : x(s), y(s), z(s), w(s) {}
  float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
  float4& operator+=(float4 b) {
    x += b.x;
    y += b.y;
    z += b.z;
    w += b.w;
    return *this;
  }
};
inline float4 operator*(float4 a, float4 b) {
  return float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
inline float4 operator*(float4 a, float s) {
  return a * float4(s);
}
