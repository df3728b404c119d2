// The dilated mask of one image in a block's shared memory, for csrc/cuda/replace_patches.cu.
//
// Eq.: METHOD.md, 4.1 and 4.2.

#pragma once

#include "replace_patches.h"

#include <cstdint>

namespace lbdt {

struct Mask {
  const uint32_t* masked;
  const uint32_t* closed;  // the patches that are no donors
  const int* before;
  int free;  // outside of `closed`; 0 iff the mask covers the image
};

// An image's `mask` [N], dilated, in `shared` [2 * words; 3 * words with patches to `avoid`, which may be null], and
// the number of its free patches. All threads of the block.
template <int kThreads>
__device__ Mask build_mask(const bool* mask, const bool* avoid, Grid grid, int padding, uint32_t* shared) {
  const int patches = grid.patches(), words = grid.words();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* masked = shared;
  uint32_t* rows = shared + words;
  // A warp's 32 patches are one word.
  for (int p = threadIdx.x; p < words * 32; p += kThreads) {
    const uint32_t word = __ballot_sync(~0u, p >= patches || mask[p]);
    if (lane == 0) masked[p / 32] = word;
  }
  __syncthreads();
  if (padding > 0) {
    for (int p = threadIdx.x; p < words * 32; p += kThreads) {
      const uint32_t word = __ballot_sync(~0u, p >= patches || near_in_row(masked, grid, p, padding));
      if (lane == 0) rows[p / 32] = word;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < words * 32; p += kThreads) {
      const uint32_t word = __ballot_sync(~0u, p >= patches || near_in_column(rows, grid, p, padding));
      if (lane == 0) masked[p / 32] = word;
    }
    __syncthreads();
  }

  const uint32_t* closed = masked;
  if (avoid != nullptr) {
    uint32_t* both = rows + words;
    bool some = false;
    for (int p = threadIdx.x; p < words * 32; p += kThreads) {
      const uint32_t word = __ballot_sync(~0u, p >= patches || avoid[p]) | masked[p / 32];
      if (lane == 0) both[p / 32] = word;
      some |= word != ~0u;
    }
    if (__syncthreads_or(some)) closed = both;
  }

  // Exclusive prefix sum of the free patches, a run of words to each thread.
  __shared__ int totals[kThreads / 32];
  int* before = reinterpret_cast<int*>(rows);
  const int run = (words + kThreads - 1) / kThreads;
  const int first = min(words, static_cast<int>(threadIdx.x) * run), last = min(words, first + run);
  int own = 0;
  for (int i = first; i < last; ++i) own += count_bits(~closed[i]);
  int sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  int free = 0, place = sum - own;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) place += totals[i];
    free += totals[i];
  }
  for (int i = first; i < last; ++i) {
    before[i] = place;
    place += count_bits(~closed[i]);
  }
  __syncthreads();
  return {masked, closed, before, free};
}

}  // namespace lbdt
