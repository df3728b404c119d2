// patch_uniform on CPU tensors. Schema, checks and fake: lbdt/ops/patch_uniform.py.
//
// Eq.: csrc/patch_uniform.h. Writes 4 * B * N bytes.

#include "checks.h"
#include "patch_uniform.h"
#include "timesteps.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 12;  // numbers drawn per task

void patch_uniform_cpp(
    const Tensor seeds,      // [B] int64, any stride, as the next two
    const Tensor timesteps,  // [B] int64 | int32 | float32 | float16 | bfloat16 | float64
    const Tensor halves,     // [B] int64
    Tensor out) {            // [B, N] float32, contiguous
  lbdt::check_patch_uniform(seeds, timesteps, halves, out);
  const int64_t batch = out.size(0), patches = out.size(1);
  std::vector<uint32_t> times(batch);
  lbdt::each_timestep(
      "timesteps", timesteps, [&](int64_t row, auto value) { times[row] = lbdt::timestep_word(value); });
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
