// Single pre-activations, as the tiles of float32 compute them.

#pragma once

#include "detection.h"
#include "feature_map.h"
#include "screen.h"
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace lbdt {

#if defined(__x86_64__)
#define LBDT_FMA __attribute__((target("fma")))
#else
#define LBDT_FMA
#endif

constexpr int64_t kChains = 8;  // side by side, as each waits for its own additions

// Sums in the order of the tiles: one addition after the other.
LBDT_FMA inline void chains(const float* const* rows, const float* x, int64_t width, float* sums) {
  float sum[kChains];
  for (int64_t i = 0; i < kChains; ++i) sum[i] = sums[i];
  for (int64_t c = 0; c < width; ++c)
    for (int64_t i = 0; i < kChains; ++i) sum[i] = __builtin_fmaf(rows[i][c], x[c], sum[i]);
  for (int64_t i = 0; i < kChains; ++i) sums[i] = sum[i];
}

// In whatever order is fastest.
LBDT_CLONES inline float quick_product(const float* w, const float* x, int64_t width) {
  constexpr int kLanes = 64;
  float sums[kLanes] = {}, sum = 0.0f;
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes)
    for (int i = 0; i < kLanes; ++i) sums[i] += w[c + i] * x[c + i];
  for (; c < width; ++c) sum += w[c] * x[c];
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

// Of the latents of a screened dictionary with a few patches.
template <typename T>
class ExactProducts {
 public:
  static constexpr int64_t kPatches = 16;  // at most

  ExactProducts(const DetectCall& call, const FeatureMap<T>& x)
      : call_(call),
        map_(x),
        panel_(floats(kPatches * x.width)),
        rows_(floats(kPatches * x.width)),
        room_(floats(kChains * x.width)) {}

  // The patches that `exceeding` is asked for next: `count`, ascending positions in B * N.
  void take(const int64_t* patches, int64_t count) {
    map_.pack(patches, count, 0, map_.width, kPatches, panel_.get());
    constexpr int64_t kLine = 16;  // floats of a cache line
    for (int64_t from = 0; from < map_.width; from += kLine)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = from; c < std::min(from + kLine, map_.width); ++c)
          rows_.get()[i * map_.width + c] = panel_.get()[c * kPatches + i];
    for (int64_t i = 0; i < count; ++i) {
      const float* row = rows_.get() + i * map_.width;
      const float length = std::sqrt(quick_product(row, row, map_.width)) + 0x1p-60f * std::sqrt(float(map_.width));
      length_[i] = length < kLarge ? length : std::numeric_limits<float>::infinity();
    }
  }

  // Has the memory of a latent's row fetched, which is asked for soon.
  void fetch(int64_t latent) const {
    if constexpr (std::is_same_v<T, float>) {
      if (call_.weight.stride(1) != 1) return;
      const char* row = reinterpret_cast<const char*>(
          dictionary_rows<T>(call_.weight, call_.order, latent, 1, nullptr).data);
      for (int64_t at = 0; at < map_.width * 4; at += 64) __builtin_prefetch(row + at);
    }
  }

  // How many of `count` latents, at most kChains, have a pre-activation on the i-th of them that exceeds `value`. Quick
  // products decide where they must agree with those of the tiles.
  int64_t exceeding(const int64_t* latents, int64_t count, int64_t i, float value) {
    const float* x = rows_.get() + i * map_.width;
    const float* near[kChains];
    float start[kChains];
    int64_t found = 0, left = 0;
    for (int64_t j = 0; j < count; ++j) {
      float* room = room_.get() + left * map_.width;
      const float* w = dictionary_rows<T>(call_.weight, call_.order, latents[j], 1, room).data;
      const float bias = call_.bias[latents[j]], h = bias + quick_product(w, x, map_.width);
      const ScreenLatents bounds = call_.screen->from(latents[j]);
      const float length = (*bounds[kInner] + *bounds[kOuter]) * length_[i];  // at least that of w, times that of x
      const float apart = screen_rounding(map_.width) * length + *bounds[kSlack];
      if (std::fabs(h - value) > apart) {
        found += h > value;
      } else {
        near[left] = w;
        start[left++] = bias;
      }
    }
    if (left == 0) return found;
    for (int64_t j = left; j < kChains; ++j) {
      near[j] = near[0];
      start[j] = 0.0f;
    }
    chains(near, x, map_.width, start);
    return found + std::count_if(start, start + left, [&](float h) { return h > value; });
  }

 private:
  const DetectCall& call_;
  const FeatureMap<T>& map_;
  const Floats panel_, rows_, room_;
  float length_[kPatches];
};

}  // namespace lbdt
