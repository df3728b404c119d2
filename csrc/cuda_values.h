// Element types on the device: conversions without the operators of the half types, which builds under torch's own
// flags lack, and vectors that one instruction moves.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lbdt {

__device__ inline float to_sum(float v) { return v; }
__device__ inline double to_sum(double v) { return v; }
__device__ inline float to_sum(__half v) { return __half2float(v); }
__device__ inline float to_sum(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_sum(float v, float& to) { to = v; }
__device__ inline void from_sum(double v, double& to) { to = v; }
__device__ inline void from_sum(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_sum(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

}  // namespace lbdt
