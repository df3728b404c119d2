// The loops of detect_patches over a block of pre-activations [latents, patches], or over their bits.

#pragma once

#include "tiles.h"

#include <cstdint>

namespace lbdt {

// The largest value of each patch above its threshold, so far, and the latent that has it.
LBDT_CLONES static void keep_largest(
    const float* h, int64_t patches, float floor, int32_t latent, float* largest, int32_t* owner) {
  for (int64_t i = 0; i < patches; ++i) {
    const bool larger = h[i] > floor && h[i] > largest[i];
    largest[i] = larger ? h[i] : largest[i];
    owner[i] = larger ? latent : owner[i];
  }
}

LBDT_CLONES static void keep_evidence(const float* h, int64_t patches, float floor, uint8_t* evidence) {
  for (int64_t i = 0; i < patches; ++i) evidence[i] |= h[i] > floor;
}

// The owner is left out by index, not by value: its two computations may round differently.
LBDT_CLONES static void count_larger(
    const float* h,
    int64_t rows,
    int64_t patches,
    int32_t first,
    const float* value,
    const int32_t* owner,
    int32_t* count) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < patches; ++i)
      count[i] += (h[r * patches + i] > value[i]) & (owner[i] != first + static_cast<int32_t>(r));
}

// The first place from `from` on at which one of these bits is set; `size` where there is none. They are rare.
LBDT_CLONES static int64_t next_with(const uint32_t* words, int64_t from, int64_t size, uint32_t bits) {
  constexpr int64_t kTogether = 64;
  for (; from + kTogether <= size; from += kTogether) {
    uint32_t found = 0;
    for (int64_t i = 0; i < kTogether; ++i) found |= words[from + i];
    if (found & bits) break;
  }
  while (from < size && !(words[from] & bits)) ++from;
  return from;
}

}  // namespace lbdt
