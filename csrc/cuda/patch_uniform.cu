// patch_uniform on CUDA tensors. Schema, checks and fake: lbdt/ops/patch_uniform.py.
//
// Eq.: csrc/patch_uniform.h. Writes 4 * B * N bytes.

#include "checks.h"
#include "cuda_launch.h"
#include "cuda_values.h"
#include "patch_uniform.h"

#include <algorithm>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

__device__ int64_t widen(int64_t t) { return t; }
__device__ int64_t widen(int32_t t) { return t; }
template <typename T>
__device__ double widen(T t) { return lbdt::to_sum(t); }

template <typename T>
__global__ void __launch_bounds__(kThreads) patch_uniform_kernel(
    const int64_t* seeds,  // [B], the steps are strides
    int64_t seed_step,
    const T* timesteps,  // [B]
    int64_t time_step,
    const int64_t* halves,  // [B]
    int64_t half_step,
    float* out,  // [B, N]
    int64_t batch,
    int64_t patches) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < batch * patches; i += stride) {
    const int64_t row = i / patches, patch = i % patches;
    out[i] = lbdt::patch_number(
        static_cast<uint64_t>(seeds[row * seed_step]), lbdt::timestep_word(widen(timesteps[row * time_step])),
        static_cast<uint32_t>(halves[row * half_step]), static_cast<uint32_t>(patch));
  }
}

template <typename T>
void launch(const Tensor& seeds, const Tensor& timesteps, const Tensor& halves, const Tensor& out) {
  const int64_t batch = out.size(0), patches = out.size(1);
  const int64_t blocks = std::min<int64_t>((batch * patches + kThreads - 1) / kThreads, INT32_MAX);
  patch_uniform_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, lbdt::current_stream(out)>>>(
      static_cast<const int64_t*>(seeds.const_data_ptr()), seeds.stride(0),
      static_cast<const T*>(timesteps.const_data_ptr()), timesteps.stride(0),
      static_cast<const int64_t*>(halves.const_data_ptr()), halves.stride(0),
      static_cast<float*>(out.mutable_data_ptr()), batch, patches);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void patch_uniform_cuda(
    const Tensor seeds,      // [B] int64, any stride, as the next two
    const Tensor timesteps,  // [B] int64 | int32 | float32 | float16 | bfloat16 | float64
    const Tensor halves,     // [B] int64
    Tensor out) {            // [B, N] float32, contiguous
  lbdt::check_patch_uniform(seeds, timesteps, halves, out);
  if (out.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  switch (timesteps.scalar_type()) {
    case ScalarType::Long: return launch<int64_t>(seeds, timesteps, halves, out);
    case ScalarType::Int: return launch<int32_t>(seeds, timesteps, halves, out);
    case ScalarType::Float: return launch<float>(seeds, timesteps, halves, out);
    case ScalarType::Double: return launch<double>(seeds, timesteps, halves, out);
    case ScalarType::Half: return launch<__half>(seeds, timesteps, halves, out);
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(seeds, timesteps, halves, out);
    default: STD_TORCH_CHECK(false, "timesteps: expected int64, int32 or a floating point dtype");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CUDA, m) {
  m.impl("patch_uniform_cpp", TORCH_BOX(&patch_uniform_cuda));
}
