// The rows of a denoiser call, branch by branch and in each image by image: what lbdt/call_rows.py says of them.

#pragma once

#include "../checks.h"
#include "../patch_uniform.h"
#include "timesteps.h"

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace lbdt {

// The place of the value nearest to `wanted`; of equals the first, and NaN before all, as in torch.argmin.
inline int64_t nearest(float wanted, const float* values, int64_t count) {
  int64_t best = 0;
  float least = std::fabs(wanted - values[0]);
  for (int64_t i = 1; i < count && !std::isnan(least); ++i) {
    const float distance = std::fabs(wanted - values[i]);
    if (distance < least || std::isnan(distance)) {
      least = distance;
      best = i;
    }
  }
  return best;
}

struct CallSettings {
  using Tensor = torch::stable::Tensor;

  const Tensor& timesteps;                // [B]
  const Tensor& times;                    // [T] float32
  const Tensor& enabled;                  // [S, U] bool
  const Tensor& seeds;                    // [R] int64
  const std::optional<Tensor>& schedule;  // of the steps, of which [first, last) are treated; none: all are
  int64_t images, first, last;
  int64_t cond;     // the branch that decides for all of an image; -1: each for itself
  int64_t counted;  // bit i: whether branch i is treated; of branch 63 on the sign
};

struct CallRows {
  int64_t batch;
  std::vector<float> times;                // [B], as all of these
  std::vector<uint32_t> words, halves;     // what patch_number takes
  std::vector<uint64_t> seeds;
  std::vector<int64_t> bins, deciding;
  std::vector<uint8_t> inside;             // whether the row's step is treated
  std::vector<uint8_t> enabled;            // [B, U]
};

// Of arguments that were checked.
inline CallRows call_rows(const CallSettings& s) {
  const int64_t batch = s.timesteps.size(0), watched = s.enabled.size(1), bins = s.times.size(0);
  const int64_t seeds_each = s.images / s.seeds.size(0), sets_each = s.images / s.enabled.size(0);
  const auto* seeds = static_cast<const int64_t*>(s.seeds.const_data_ptr());
  const auto* times = static_cast<const float*>(s.times.const_data_ptr());
  const auto* sets = static_cast<const uint8_t*>(s.enabled.const_data_ptr());
  CallRows rows{batch, std::vector<float>(batch), std::vector<uint32_t>(batch), {}, {}, {}, {}, {}, {}};
  each_timestep("timesteps", s.timesteps, [&](int64_t b, auto value) {
    rows.times[b] = static_cast<float>(value);
    rows.words[b] = timestep_word(value);
  });
  std::vector<float> steps(s.schedule ? s.schedule->size(0) : 0);
  if (s.schedule)
    each_timestep("schedule", *s.schedule, [&](int64_t i, auto value) { steps[i] = static_cast<float>(value); });
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t half = b / s.images, image = b % s.images;
    rows.halves.push_back(static_cast<uint32_t>(half));
    rows.seeds.push_back(static_cast<uint64_t>(seeds[image / seeds_each]) + static_cast<uint64_t>(image % seeds_each));
    rows.bins.push_back(nearest(rows.times[b], times, bins));
    rows.deciding.push_back(s.cond < 0 ? b : s.cond * s.images + image);
    const int64_t step = s.schedule ? nearest(rows.times[b], steps.data(), static_cast<int64_t>(steps.size())) : 0;
    rows.inside.push_back(!s.schedule || (s.first <= step && step < s.last));
    const bool treated = rows.inside[b] && (half < 63 ? s.counted >> half & 1 : s.counted < 0);
    const uint8_t* own = sets + image / sets_each * watched;
    for (int64_t u = 0; u < watched; ++u) rows.enabled.push_back(treated && own[u]);
  }
  return rows;
}

}  // namespace lbdt
