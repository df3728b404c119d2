// patch_uniform on CPU tensors. Schema, checks and fake: lbdt/ops/patch_uniform.py.
//
// Eq.: csrc/patch_uniform.h. Writes 4 * B * N bytes.

#include "checks.h"
#include "patch_uniform.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 12;  // numbers drawn per task

template <typename T, typename Wide>
void read_timesteps(const Tensor& timesteps, std::vector<uint32_t>& words) {
  const T* from = static_cast<const T*>(timesteps.const_data_ptr());
  for (size_t i = 0; i < words.size(); ++i)
    words[i] = lbdt::timestep_word(static_cast<Wide>(from[static_cast<int64_t>(i) * timesteps.stride(0)]));
}

void patch_uniform_cpp(
    const Tensor seeds,      // [B] int64, any stride, as the next two
    const Tensor timesteps,  // [B] int64 | int32 | float32 | float16 | bfloat16 | float64
    const Tensor halves,     // [B] int64
    Tensor out) {            // [B, N] float32, contiguous
  lbdt::check_patch_uniform(seeds, timesteps, halves, out);
  const int64_t batch = out.size(0), patches = out.size(1);
  std::vector<uint32_t> times(batch);
  switch (timesteps.scalar_type()) {
    case ScalarType::Long: read_timesteps<int64_t, int64_t>(timesteps, times); break;
    case ScalarType::Int: read_timesteps<int32_t, int64_t>(timesteps, times); break;
    case ScalarType::Float: read_timesteps<float, double>(timesteps, times); break;
    case ScalarType::Double: read_timesteps<double, double>(timesteps, times); break;
    case ScalarType::Half: read_timesteps<torch::headeronly::Half, double>(timesteps, times); break;
    case ScalarType::BFloat16: read_timesteps<torch::headeronly::BFloat16, double>(timesteps, times); break;
    default: STD_TORCH_CHECK(false, "timesteps: expected int64, int32 or a floating point dtype");
  }
  const int64_t* seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  const int64_t* half = static_cast<const int64_t*>(halves.const_data_ptr());
  const int64_t seed_step = seeds.stride(0), half_step = halves.stride(0);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * patches, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // row by row
      const int64_t row = begin / patches, first = begin % patches;
      const int64_t last = std::min(patches, first + end - begin);
      const uint64_t key = static_cast<uint64_t>(seed[row * seed_step]);
      const uint32_t time = times[row], branch = static_cast<uint32_t>(half[row * half_step]);
      for (int64_t p = first; p < last; ++p)
        to[row * patches + p] = lbdt::patch_number(key, time, branch, static_cast<uint32_t>(p));
      begin += last - first;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("patch_uniform_cpp", TORCH_BOX(&patch_uniform_cpp));
}
