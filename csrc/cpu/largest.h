// The first pass of detect_patches on the CPU: the largest passing pre-activation of each patch.

#pragma once

#include "../checks.h"
#include "comparisons.h"
#include "detection.h"
#include "feature_map.h"
#include "screen.h"
#include "tiles.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace lbdt {

constexpr float kZeros[kBlock] = {};
constexpr int64_t kScreened = 32;  // watched latents from which on coding the patches is worth its time

// Of each patch [B * N].
struct Largest {
  std::vector<float> value;       // its largest passing pre-activation, -infinity where there is none
  std::vector<int32_t> owner;     // and the latent it is of
  std::vector<uint8_t> evidence;  // [C, B * N], whether a latent of a concept passes; empty without a gate
  std::vector<uint8_t> odd;       // whether it may hold a NaN or infinity; empty where not asked for

  Largest(const DetectCall& call, int64_t patches)
      : value(patches, -std::numeric_limits<float>::infinity()),
        owner(patches),
        evidence(call.gate ? call.gate->concepts * patches : 0),
        odd(call.not_finite ? patches : 0, 1) {}
};

template <typename T>
class FindLargest {
 public:
  FindLargest(const DetectCall& call, const FeatureMap<T>& x, Largest& largest)
      : call_(call), x_(x), largest_(largest) {}

  void run() {
    const Watched own = watch();
    if (call_.screened() && own.size() >= kScreened) return run_screened(own);
    const int64_t lanes = kernels().lanes * kernels().vectors;
    const int64_t size = x_.in_rows() ? kBlock / 2 : lanes;  // patches of a task
    const int64_t tasks = divide_up(x_.patches, size);
    const Floats turned = x_.in_rows() ? turn(own, lanes) : floats(0);
    const int64_t grain = 1 + kGrain / (1 + size * own.size() * x_.width);
    torch::stable::parallel_for(0, x_.images * tasks, grain, [&](int64_t begin, int64_t end) {
      Floats room = floats(size * x_.width), h = floats(kBlock * lanes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tasks, start = task % tasks * size;
        const int64_t count = std::min(size, x_.patches - start);
        if (own.end[image] == 0) continue;
        if (x_.in_rows()) {
          largest_in_rows(own, turned.get(), lanes, image, start, count, room.get(), h.get());
        } else {
          largest_in_columns(own, image, start, count, room.get(), h.get());
        }
      }
    });
  }

 private:
  static constexpr float kInf = std::numeric_limits<float>::infinity();

  // The latents of the concepts that count in some image, A of them.
  struct Watched {
    std::vector<int64_t> place;   // [A], among the U
    std::vector<int32_t> latent;  // [A]
    Floats weight;                // [A, d]
    std::vector<float> bias;      // [A]
    std::vector<float> floor;     // [B, A], +inf where a latent does not count
    std::vector<int64_t> end;     // [B], the latents that need be looked at: none behind it counts
    int64_t size() const { return static_cast<int64_t>(place.size()); }
  };

  float floor(int64_t image, int64_t u) const {
    const int64_t count = call_.union_size;
    return call_.enabled[image * count + u] ? call_.thresholds[call_.bins[image] * count + u] : kInf;
  }

  Watched watch() const {
    const int64_t width = x_.width;
    Watched own{{}, {}, floats(0), {}, {}, {}};
    for (int64_t u = 0; u < call_.union_size; ++u) {
      bool counts = call_.not_finite != nullptr && u == 0;  // the first tells odd patches
      for (int64_t b = 0; b < x_.images && !counts; ++b) counts = floor(b, u) < kInf;
      if (counts) own.place.push_back(u);
    }
    own.weight = floats(own.size() * width);
    for (int64_t a = 0; a < own.size(); ++a) {
      const int64_t latent = call_.latents[own.place[a]];
      float* to = own.weight.get() + a * width;
      if (call_.order) check_within("order", call_.order + latent, 1, call_.weight.size(0));
      const Rows row = dictionary_rows<T>(call_.weight, call_.order, latent, 1, to);
      if (row.data != to) std::copy_n(row.data, width, to);
      own.bias.push_back(call_.bias[latent]);
      own.latent.push_back(static_cast<int32_t>(latent));
    }
    for (int64_t b = 0; b < x_.images; ++b) {
      own.end.push_back(std::min<int64_t>(own.size(), call_.not_finite != nullptr));
      for (int64_t a = 0; a < own.size(); ++a) {
        own.floor.push_back(floor(b, own.place[a]));
        if (own.floor.back() < kInf) own.end[b] = a + 1;
      }
    }
    return own;
  }

  // h [latents, patches]: the patches are the columns.
  void largest_in_columns(
      const Watched& own, int64_t image, int64_t start, int64_t count, float* room, float* h) {
    const int64_t lanes = divide_up(count, kernels().lanes) * kernels().lanes;
    const Rows panel = x_.columns(image, start, count, lanes, room);
    for (int64_t u = 0; u < own.end[image]; u += kBlock) {
      const int64_t some = std::min(kBlock, own.end[image] - u);
      const Rows rows{own.weight.get() + u * x_.width, x_.width};
      product(rows, own.bias.data() + u, some, panel.data, panel.step, x_.width, h, lanes);
      if (u == 0) keep_odd(h, 1, image * x_.patches + start, count);
      for (int64_t r = 0; r < some; ++r)
        keep(own, image, u + r, h + r * lanes, count, image * x_.patches + start);
    }
  }

  // What run does, but a latent is only looked at in the patches around which it may pass its threshold.
  void run_screened(const Watched& own) {
    const int64_t tasks = divide_up(x_.patches, kScreenLanes), words = call_.screen->words();
    std::vector<int8_t> codes(own.size() * words * kWord);
    for (int64_t a = 0; a < own.size(); ++a)
      std::copy_n(call_.screen->row(own.latent[a]), words * kWord, codes.data() + a * words * kWord);
    std::vector<std::vector<float>> bounds;
    for (int64_t b = 0; b < x_.images; ++b) bounds.push_back(bounds_of(own, b));
    const int64_t grain = 1 + kGrain / (1 + kScreenLanes * own.size() * words);
    torch::stable::parallel_for(0, x_.images * tasks, grain, [&](int64_t begin, int64_t end) {
      const int64_t lanes = kScreenLanes;
      const Floats room = floats(lanes * x_.width), rows = floats(kBlock * x_.width), h = floats(kBlock * lanes);
      std::vector<uint32_t> panel(lanes * words);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tasks, start = task % tasks * lanes;
        const int64_t count = std::min(lanes, x_.patches - start);
        if (own.end[image] == 0) continue;
        int64_t patches[kScreenLanes];
        std::iota(patches, patches + count, image * x_.patches + start);
        x_.pack(patches, count, 0, x_.width, lanes, room.get());
        ScreenPanel coded{lanes, count, panel.data(), {}};
        code_panel(room.get(), x_.width, call_.screen->centre, coded);
        // How far above its threshold: the bounds have it taken from the bias.
        std::fill_n(coded.patches.value, count, 0.0f);
        for (int64_t i = 0; call_.not_finite && i < count; ++i)
          largest_.odd[patches[i]] = !std::isfinite(coded.patches.inner[i]);
        const ScreenLatents limits{bounds[image].data(), own.size()};
        std::vector<int64_t> some;
        for (int64_t first = 0; first < own.size(); first += kBlock) {
          const int64_t size = std::min(kBlock, own.size() - first);
          ScreenCounts counts{};
          ScreenBits bits[kBlock];
          screen_block(
              codes.data() + first * words * kWord, words * kWord, size, coded.words, words, lanes,
              limits.from(first), coded.patches, 0, counts, bits);
          for (int64_t r = 0; r < size; ++r)
            if (bits[r].may != 0) some.push_back(first + r);
        }
        for (size_t first = 0; first < some.size(); first += kBlock)
          largest_of(own, some.data() + first, std::min<int64_t>(kBlock, some.size() - first), patches, count,
                     room.get(), rows.get(), h.get());
      }
    });
  }

  // The bounds of the watched latents, as of a Screen, of what they exceed their thresholds by.
  std::vector<float> bounds_of(const Watched& own, int64_t image) const {
    std::vector<float> out(kScreenKinds * own.size());
    for (int64_t a = 0; a < own.size(); ++a) {
      const ScreenLatents whole = call_.screen->from(own.latent[a]);
      for (const ScreenKind kind : {kScale, kStart, kInner, kOuter, kSlack, kSum})
        out[kind * own.size() + a] = *whole[kind];
      const float floor = own.floor[image * own.size() + a];
      out[kStart * own.size() + a] -= floor;
      float& slack = out[kSlack * own.size() + a];
      if (std::isfinite(floor))
        slack += std::fabs(floor) < kLarge * kLarge ? screen_rounding(x_.width) * std::fabs(floor) : kInf;
    }
    return out;
  }

  // Looks at `some` of the watched latents in patches that lie in `panel` [d, kScreenLanes].
  void largest_of(
      const Watched& own,
      const int64_t* some,
      int64_t size,
      const int64_t* patches,
      int64_t count,
      const float* panel,
      float* rows,
      float* h) {
    const int64_t lanes = kScreenLanes, most = std::min(lanes, kernels().lanes * kernels().vectors);
    const bool in_rows = x_.in_rows();  // where the bias is added last
    std::vector<float> bias(size);
    for (int64_t r = 0; r < size; ++r) {
      std::copy_n(own.weight.get() + some[r] * x_.width, x_.width, rows + r * x_.width);
      bias[r] = own.bias[some[r]];
    }
    for (int64_t lane = 0; lane < count; lane += most) {
      const int64_t here = std::min(most, count - lane), image = patches[0] / x_.patches;
      product({rows, x_.width}, in_rows ? kZeros : bias.data(), size, panel + lane, lanes, x_.width, h, most);
      for (int64_t r = 0; r < size; ++r) {
        float* row = h + r * most;
        for (int64_t i = 0; in_rows && i < here; ++i) row[i] += bias[r];
        keep(own, image, some[r], row, here, patches[lane]);
      }
    }
  }

  // Keeps what passes its threshold of one watched latent's pre-activations on `count` patches from `patch` on.
  void keep(const Watched& own, int64_t image, int64_t a, const float* h, int64_t count, int64_t patch) {
    const float floor = own.floor[image * own.size() + a];
    keep_largest(
        h, count, floor, own.latent[a], largest_.value.data() + patch, largest_.owner.data() + patch);
    if (call_.gate) keep_evidence(h, count, floor, evidence(own.place[a], patch));
  }

  // h [patches, latents]: the patches are the rows, and need not be turned.
  void largest_in_rows(
      const Watched& own,
      const float* turned,
      int64_t most,
      int64_t image,
      int64_t start,
      int64_t count,
      float* room,
      float* h) {
    const Rows rows = x_.rows(image, start, count, room);
    for (int64_t u = 0; u < own.end[image]; u += most) {
      // As many as were turned side by side, for the sake of the panel's step.
      const int64_t some = std::min(most, own.size() - u);
      const int64_t lanes = divide_up(some, kernels().lanes) * kernels().lanes;
      product(rows, kZeros, count, turned + u * x_.width, lanes, x_.width, h, lanes);
      if (u == 0) keep_odd(h, lanes, image * x_.patches + start, count);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < some; ++r) {
          const int64_t patch = image * x_.patches + start + i;
          const float value = h[i * lanes + r] + own.bias[u + r];
          if (!(value > own.floor[image * own.size() + u + r])) continue;
          if (call_.gate) *evidence(own.place[u + r], patch) = 1;
          if (value > largest_.value[patch]) {
            largest_.value[patch] = value;
            largest_.owner[patch] = own.latent[u + r];
          }
        }
    }
  }

  // Keeps which patches have a pre-activation, `step` apart, that is not finite: a NaN or infinity among the channels
  // never leaves the sum.
  void keep_odd(const float* h, int64_t step, int64_t patch, int64_t count) {
    if (!call_.not_finite) return;
    for (int64_t i = 0; i < count; ++i) largest_.odd[patch + i] = !std::isfinite(h[i * step]);
  }

  // Whether a patch is evidence for the concept of a watched latent; the next patches follow.
  uint8_t* evidence(int64_t watched, int64_t patch) {
    return largest_.evidence.data() + call_.gate->owners[watched] * x_.images * x_.patches + patch;
  }

  // The watched rows as the columns of panels [d, most] side by side in memory; zeros in the lanes left.
  Floats turn(const Watched& own, int64_t most) const {
    const int64_t width = x_.width;
    Floats out = floats(divide_up(own.size(), most) * most * width);
    for (int64_t u = 0; u < own.size(); u += most) {
      const int64_t some = std::min(most, own.size() - u);
      const int64_t lanes = divide_up(some, kernels().lanes) * kernels().lanes;
      const float* w = own.weight.get() + u * width;
      float* to = out.get() + u * width;
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = 0; i < lanes; ++i) to[c * lanes + i] = i < some ? w[i * width + c] : 0.0f;
    }
    return out;
  }

  const DetectCall& call_;
  const FeatureMap<T>& x_;
  Largest& largest_;
};

}  // namespace lbdt
