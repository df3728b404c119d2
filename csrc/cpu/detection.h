// What detect_patches.cpp computes, for other ops that have checked their arguments.

#pragma once

#include "gate.h"
#include "screen.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace lbdt {

struct DetectCall {
  const torch::stable::Tensor& weight;  // [L, d] dtype of x, any strides
  // [L], the row of weight that each latent is; null: its own. That they are rows is looked at where they are read.
  const int64_t* order;
  const float* bias;                    // [L]
  const int64_t* latents;               // [U], in [0, L)
  const float* thresholds;              // [T, U]
  const int64_t* bins;                  // [B], in [0, T)
  const uint8_t* enabled;               // [B, U]
  int64_t union_size, k;
  bool* mask;  // [B, N], out
  std::optional<Gate> gate;
  std::optional<Screen> screen;  // of weight and bias; none: everything is counted in float32
  int64_t* not_finite = nullptr;  // [B], out: the patches with a NaN or infinity in x or minus; null: not asked for

  // Whether products are bounded in int8 first.
  bool screened() const { return screen && screen->width <= kMostScreened && screen_kernels() != nullptr; }
};

// Fills what is out of `call`, for x [B, d, H, W] or [B, d, N] in float32, float16 or bfloat16, and `minus` like it.
void detect(
    const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& minus, const DetectCall& call);

}  // namespace lbdt
