// The rank test of detect_patches on the CPU: how many latents exceed a value, all counted in float32.

#pragma once

#include "comparisons.h"
#include "detection.h"
#include "feature_map.h"
#include "largest.h"
#include "tiles.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

namespace lbdt {

template <typename T>
class Rank {
 public:
  Rank(const DetectCall& call, const FeatureMap<T>& x, const Largest& largest)
      : call_(call), x_(x), largest_(largest) {}

  // Clears the mask of those `alive` that at least k other latents exceed. Between parts of the dictionary,
  // each as long as all before it, the patches whose count is full are dropped.
  void run(std::vector<int64_t> alive) const {
    const int64_t latents = call_.weight.size(0), lanes = kernels().lanes;
    const int64_t least = std::max<int64_t>(4 * call_.k, kBlock * torch::stable::get_num_threads());
    std::vector<std::atomic<int32_t>> counts(alive.empty() ? 0 : x_.images * x_.patches);
    const Columns<float> packed(divide_up(alive.size(), lanes) * lanes * x_.width);
    std::vector<Candidates> panels;
    int64_t vectors = 0;
    for (int64_t start = 0, stop; start < latents && !alive.empty(); start = stop) {
      stop = std::min(latents, start + std::max(start, divide_up(least, kBlock) * kBlock));
      const int64_t needed = divide_up(alive.size(), lanes);
      if (needed != vectors) panels = pack(alive, packed.get());
      vectors = needed;
      count(panels, start, stop, counts);
      const auto full = [&](int64_t p) {
        if (counts[p].load(std::memory_order_relaxed) < call_.k) return false;
        call_.mask[p] = false;
        return true;
      };
      alive.erase(std::remove_if(alive.begin(), alive.end(), full), alive.end());
    }
  }

 private:
  struct Candidates : Panel {
    float value[kMostLanes];  // +inf, which nothing exceeds, in the lanes left
    int32_t owner[kMostLanes];
  };

  std::vector<Candidates> pack(const std::vector<int64_t>& alive, float* packed) const {
    std::vector<Candidates> panels;
    for (const Panel& plain : x_.panels(alive, packed)) {
      Candidates& panel = panels.emplace_back(Candidates{plain, {}, {}});
      std::fill_n(panel.value, kMostLanes, std::numeric_limits<float>::infinity());
      std::fill_n(panel.owner, kMostLanes, -1);
      for (int64_t j = 0; j < panel.filled; ++j) {
        panel.value[j] = largest_.value[panel.patch[j]];
        panel.owner[j] = largest_.owner[panel.patch[j]];
      }
    }
    return panels;
  }

  // Adds to each patch's count the latents of [start, stop), but its owner, that exceed its value.
  void count(
      const std::vector<Candidates>& panels,
      int64_t start,
      int64_t stop,
      std::vector<std::atomic<int32_t>>& counts) const {
    const int64_t tasks = divide_up(stop - start, kBlock);
    const int64_t work = kBlock * x_.width * static_cast<int64_t>(panels.size()) * kMostLanes;
    const auto open = [&](int64_t p) { return counts[p].load(std::memory_order_relaxed) < call_.k; };
    std::atomic<int64_t> next{0};  // taken one by one: the cores may be shared, and unequally fast
    torch::stable::parallel_for(0, tasks, 1 + kGrain / (1 + work), [&](int64_t, int64_t) {
      const Floats room = floats(kBlock * x_.width), h = floats(kBlock * kMostLanes);
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t first = start + task * kBlock, some = std::min(kBlock, stop - first);
        const Rows w = dictionary_rows<T>(call_.weight, call_.order, first, some, room.get());
        for (const Candidates& p : panels) {
          if (std::none_of(p.patch, p.patch + p.filled, open)) continue;
          int32_t larger[kMostLanes] = {};
          product(w, call_.bias + first, some, p.data, p.lanes, x_.width, h.get(), p.lanes);
          count_larger(h.get(), some, p.lanes, static_cast<int32_t>(first), p.value, p.owner, larger);
          for (int64_t i = 0; i < p.filled; ++i)
            if (larger[i] > 0) counts[p.patch[i]].fetch_add(larger[i], std::memory_order_relaxed);
        }
      }
    });
  }

  const DetectCall& call_;
  const FeatureMap<T>& x_;
  const Largest& largest_;
};

}  // namespace lbdt
