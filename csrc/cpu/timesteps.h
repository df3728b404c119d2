// Timesteps [B] of any dtype that patch_uniform takes.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace lbdt {

template <typename T, typename Wide, typename Take>
void read_each(const torch::stable::Tensor& values, const Take& take) {
  const T* from = static_cast<const T*>(values.const_data_ptr());
  const int64_t step = values.stride(0), count = values.size(0);
  for (int64_t i = 0; i < count; ++i) take(i, static_cast<Wide>(from[i * step]));
}

// Calls `take(place, value)` for each, with an int64_t, float or double.
template <typename Take>
void each_timestep(const char* name, const torch::stable::Tensor& values, const Take& take) {
  using torch::headeronly::ScalarType;
  switch (values.scalar_type()) {
    case ScalarType::Long: return read_each<int64_t, int64_t>(values, take);
    case ScalarType::Int: return read_each<int32_t, int64_t>(values, take);
    case ScalarType::Float: return read_each<float, float>(values, take);
    case ScalarType::Double: return read_each<double, double>(values, take);
    case ScalarType::Half: return read_each<torch::headeronly::Half, float>(values, take);
    case ScalarType::BFloat16: return read_each<torch::headeronly::BFloat16, float>(values, take);
    default: STD_TORCH_CHECK(false, name, ": expected int64, int32 or a floating point dtype");
  }
}


}  // namespace lbdt
