// What replace_patches.cpp computes, for other ops that have checked their arguments.

#pragma once

#include "../patch_uniform.h"
#include "../replace_patches.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <optional>

namespace lbdt {

// A number in [0, 1) for every patch: those that are given, or drawn where one is asked for (csrc/patch_uniform.h).
struct Numbers {
  const float* given = nullptr;    // [B, N]
  const uint64_t* seeds = nullptr;  // [B], as the next two
  const uint32_t* times = nullptr;
  const uint32_t* halves = nullptr;

  float at(int64_t row, int64_t patch, int64_t patches) const {
    return given ? given[row * patches + patch]
                 : patch_number(seeds[row], times[row], halves[row], static_cast<uint32_t>(patch));
  }
};

struct ReplaceCall {
  const torch::stable::Tensor& x;  // [B, d, H, W] or [B, d, N], any strides
  Grid grid;
  const uint8_t* mask;  // [B, N]
  Numbers numbers;
  const void* bank;        // rows of d elements, of the dtype of x; null: there is none
  int64_t bank_rows;       // M, of one image
  const int64_t* bank_of;  // [B], which M rows an image takes from; null: its own
  const uint8_t* avoid;    // [B, N]; null: none
  int64_t padding;
  int source;
  bool* replaced;  // [B, N], out
};

// What the result is written to, by the number of patches that are replaced: a tensor like x, or in place x itself;
// nothing: it is not asked for.
using Output = std::function<std::optional<torch::stable::Tensor>(int64_t)>;

void replace(const ReplaceCall& call, bool in_place, const Output& output);

}  // namespace lbdt
