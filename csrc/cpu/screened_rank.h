// The same rank test, mostly without float32 products (METHOD.md, 2.7): int8 ones bound each pre-activation from below
// and above. A patch is refuted where k lower bounds exceed its value, and stays where fewer than k upper bounds do.
// What is left between the bounds is counted exactly: first what likely exceeds the value, as soon as that may refute
// it; the rest, of the patches that need it, in a second pass.

#pragma once

#include "exact_products.h"
#include "rank.h"
#include "screen.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace lbdt {

constexpr int64_t kShared = 64;      // patches a thread from which on they are shared out
constexpr int64_t kTogether = 1024;  // patches at most that are decided together
constexpr int64_t kDear = 8;         // times as long as one of many products a single one takes
constexpr int64_t kFew = 2048;       // products of many, in whose time single ones are worth while in any case

template <typename T>
class ScreenedRank {
 public:
  // Clears the mask of those `alive` that at least k other latents exceed. Many are shared out among the threads, which
  // then never wait for each other, and some at a time, so that little is held; of few each thread takes some latents.
  static void run(
      const DetectCall& call, const FeatureMap<T>& x, const Largest& largest, const std::vector<int64_t>& alive) {
    const int64_t count = static_cast<int64_t>(alive.size()), threads = torch::stable::get_num_threads();
    if (count < kShared * threads && count <= kTogether) return ScreenedRank(call, x, largest).decide(alive);
    const int64_t slices = std::max(threads, divide_up(count, kTogether));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < slices;) {
        const auto first = alive.begin() + i * count / slices, last = alive.begin() + (i + 1) * count / slices;
        ScreenedRank(call, x, largest).decide({first, last});
      }
    });
  }

 private:
  ScreenedRank(const DetectCall& call, const FeatureMap<T>& x, const Largest& largest)
      : call_(call), x_(x), largest_(largest), screen_(*call.screen) {}

  // Between parts of the dictionary, each a quarter as long as all before it, the patches that are refuted are dropped.
  void decide(const std::vector<int64_t>& alive) {
    patches_ = alive;
    candidates_ = std::vector<Candidate>(alive.size());
    Coded coded = code();
    const int64_t latents = screen_.latents;
    const int64_t blocks = divide_up(4 * call_.k, kBlock);
    const int64_t least = kBlock * std::max<int64_t>(blocks, torch::stable::get_num_threads());
    std::vector<Part> parts;
    for (int64_t start = 0, stop; start < latents && !coded.panels.empty(); start = stop) {
      stop = std::min(latents, start + std::max(start / 4, least) / kBlock * kBlock);
      parts.push_back(compare(coded, start, stop, false));
      settle_likely(coded, parts);
      coded = only(std::move(coded), [](const Candidate& one) { return !one.refuted && !one.vague; });
    }
    for (const int32_t index : members(coded)) {
      Candidate& one = candidates_[index];
      if (is_open(one)) one.vague = too_many(one, one.may, latents);
    }
    coded = only(std::move(coded), [&](const Candidate& one) { return is_open(one); });
    if (!coded.panels.empty()) settle_rest(coded, parts);
    std::vector<int64_t> vague;
    for (size_t i = 0; i < candidates_.size(); ++i) {
      call_.mask[patches_[i]] = !candidates_[i].refuted;
      if (candidates_[i].vague && !candidates_[i].refuted) vague.push_back(patches_[i]);
    }
    if (!vague.empty()) Rank<T>(call_, x_, largest_).run(std::move(vague));
  }

  struct Candidate {
    std::atomic<int32_t> certain{0};  // the latents that exceed its value
    std::atomic<int32_t> likely{0};   // of those that may, how many it is likely of
    std::atomic<int32_t> may{0};      // that may, and are not counted as certain
    int32_t settled = 0;              // the parts in which none is likely any more: all of these are counted
    int32_t counted = 0;              // exactly
    bool refuted = false;
    bool vague = false;  // all is to be counted in float32, as the bounds tell too little
    Candidate() = default;
    Candidate(const Candidate&) {}  // for a vector of new ones
  };

  struct Panel : ScreenPanel {
    std::array<int32_t, kScreenLanes> candidate;  // -1 in the lanes left
  };

  struct Coded {
    Columns<uint32_t> words;  // of all panels
    std::vector<Panel> panels;
  };

  // A part of the dictionary, with the patches that were compared with it.
  struct Part {
    int64_t start, stop;
    Columns<uint32_t> bits;  // [panels, stop - start]: the lanes in which a latent is to be counted exactly
    std::vector<std::array<int32_t, kScreenLanes>> lanes;  // their candidates
  };

  // Whether more latents than are counted may still refute it.
  bool is_open(const Candidate& one) const {
    return !one.refuted && !one.vague && one.certain < call_.k && one.certain + one.may >= call_.k;
  }

  // Whether to count so many `more` exactly costs clearly more than all products up to `stop`, many side by side.
  static bool too_many(const Candidate& one, int64_t more, int64_t stop) {
    return kDear * (one.counted + more) > stop + kFew;
  }

  static std::vector<int32_t> members(const Coded& coded) {
    std::vector<int32_t> all;
    for (const Panel& panel : coded.panels)
      all.insert(all.end(), panel.candidate.begin(), panel.candidate.begin() + panel.filled);
    return all;
  }

  // Panels for these candidates, without words and bounds.
  Coded room_for(const std::vector<int32_t>& candidates) const {
    const int64_t count = static_cast<int64_t>(candidates.size());
    Coded coded{Columns<uint32_t>(divide_up(count, kScreenHalf) * kScreenHalf * screen_.words()), {}};
    for (int64_t lane = 0; lane < count; lane += kScreenLanes) {
      Panel& panel = coded.panels.emplace_back();
      panel.filled = std::min(kScreenLanes, count - lane);
      panel.lanes = panel.filled > kScreenHalf ? kScreenLanes : kScreenHalf;
      panel.words = coded.words.get() + lane * screen_.words();
      panel.candidate.fill(-1);
      std::copy_n(candidates.begin() + lane, panel.filled, panel.candidate.begin());
    }
    return coded;
  }

  Coded code() const {
    std::vector<int32_t> all(patches_.size());
    std::iota(all.begin(), all.end(), 0);
    Coded coded = room_for(all);
    const int64_t count = static_cast<int64_t>(coded.panels.size()), work = 8 * kScreenLanes * x_.width;
    torch::stable::parallel_for(0, count, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
      const Floats room = floats(kScreenLanes * x_.width);
      for (int64_t i = begin; i < end; ++i) {
        Panel& panel = coded.panels[i];
        x_.pack(patches_.data() + panel.candidate[0], panel.filled, 0, x_.width, panel.lanes, room.get());
        code_panel(room.get(), x_.width, screen_.centre, panel);
        for (int64_t j = 0; j < panel.filled; ++j) {
          const int64_t patch = patches_[panel.candidate[j]];
          panel.patches.value[j] = largest_.value[patch];
          panel.patches.owner[j] = largest_.owner[patch];
        }
      }
    });
    return coded;
  }

  // The latents that are likely to exceed a value, without those that are certain to, and the counts of all; or, for
  // the `rest`, those that may, and are not likely to.
  Part compare(const Coded& coded, int64_t start, int64_t stop, bool rest) {
    const int64_t size = stop - start, count = static_cast<int64_t>(coded.panels.size());
    Part part{start, stop, Columns<uint32_t>(count * size), {}};
    for (const Panel& panel : coded.panels) part.lanes.push_back(panel.candidate);
    const int64_t tasks = divide_up(size, kBlock), work = kBlock * screen_.words() * count * kScreenLanes;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks, 1 + kGrain / (1 + work), [&](int64_t, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t first = start + task * kBlock, some = std::min(kBlock, stop - first);
        for (int64_t i = 0; i < count; ++i)
          compare_block(coded.panels[i], first, some, rest, part.bits.get() + i * size + first - start);
      }
    });
    return part;
  }

  void compare_block(const Panel& panel, int64_t first, int64_t some, bool rest, uint32_t* to) {
    const auto full = [&](int32_t candidate) {
      return candidates_[candidate].certain.load(std::memory_order_relaxed) >= call_.k;
    };
    // A patch whose count is full stays so, and is asked for no more: nobody reads the bits that are not written here.
    if (std::all_of(panel.candidate.begin(), panel.candidate.begin() + panel.filled, full)) return;
    ScreenCounts counts{};
    ScreenBits bits[kBlock];
    screen_block(
        screen_.row(first), screen_.words() * kWord, some, panel.words, screen_.words(), panel.lanes,
        screen_.from(first), panel.patches, static_cast<int32_t>(first), counts, bits);
    for (int64_t r = 0; r < some; ++r)
      to[r] = rest ? bits[r].may & ~bits[r].likely : bits[r].likely & ~bits[r].certain;
    for (int64_t j = 0; j < panel.filled && !rest; ++j) {
      if (counts.may[j] == 0) continue;
      Candidate& one = candidates_[panel.candidate[j]];
      one.certain.fetch_add(counts.certain[j], std::memory_order_relaxed);
      one.likely.fetch_add(counts.likely[j] - counts.certain[j], std::memory_order_relaxed);
      one.may.fetch_add(counts.may[j] - counts.certain[j], std::memory_order_relaxed);
    }
  }

  // The panels of those that are `wanted`; as they are where that spares none.
  template <typename Wanted>
  Coded only(Coded coded, const Wanted& wanted) const {
    std::vector<int32_t> left;
    std::vector<std::pair<const Panel*, int64_t>> from;
    int64_t halves = 0;
    for (const Panel& panel : coded.panels) {
      halves += panel.lanes / kScreenHalf;
      for (int64_t j = 0; j < panel.filled; ++j)
        if (wanted(candidates_[panel.candidate[j]])) {
          left.push_back(panel.candidate[j]);
          from.push_back({&panel, j});
        }
    }
    if (divide_up(left.size(), kScreenHalf) == halves) return coded;
    Coded fewer = room_for(left);
    auto source = from.begin();
    for (Panel& panel : fewer.panels) {
      const uint32_t* words[kScreenLanes];
      int64_t steps[kScreenLanes];
      for (int64_t j = 0; j < panel.lanes; ++j) {
        const bool some = j < panel.filled;
        const auto [old, lane] = some ? *source++ : from.front();
        words[j] = old->words + lane;
        steps[j] = old->lanes;
        panel.patches.scale[j] = old->patches.scale[lane];
        panel.patches.inner[j] = old->patches.inner[lane];
        panel.patches.outer[j] = old->patches.outer[lane];
        panel.patches.value[j] = some ? old->patches.value[lane] : std::numeric_limits<float>::infinity();
        panel.patches.owner[j] = old->patches.owner[lane];
      }
      // Lanes innermost: neighbours were mostly neighbours.
      for (int64_t c = 0; c < screen_.words(); ++c)
        for (int64_t j = 0; j < panel.lanes; ++j) panel.words[c * panel.lanes + j] = words[j][c * steps[j]];
    }
    return fewer;
  }

  // Refutes those that what is likely refutes, of which the last part is the last.
  void settle_likely(const Coded& coded, const std::vector<Part>& parts) {
    const int32_t count = static_cast<int32_t>(parts.size());
    std::vector<int32_t> some;
    for (const int32_t index : members(coded)) {
      Candidate& one = candidates_[index];
      one.refuted = one.certain >= call_.k;
      if (one.refuted || one.vague || one.certain + one.likely < call_.k) continue;
      one.vague = too_many(one, one.likely, parts.back().stop);
      if (!one.vague) some.push_back(index);
    }
    settle(some, [&](Candidate& one, ExactProducts<T>& exact, int32_t index, int64_t place) {
      for (; one.settled < count && one.certain < call_.k; ++one.settled)
        count_exactly(parts[one.settled], index, exact, place);
      one.likely = 0;
      one.refuted = one.certain >= call_.k;
    });
  }

  // Decides those of which more than what is likely may refute them.
  void settle_rest(const Coded& coded, const std::vector<Part>& parts) {
    const Part rest = compare(coded, 0, screen_.latents, true);
    // Of the panels that were left as they are, some are decided.
    settle(members(coded), [&](Candidate& one, ExactProducts<T>& exact, int32_t index, int64_t place) {
      if (!is_open(one)) return;
      for (; one.settled < static_cast<int32_t>(parts.size()) && one.certain < call_.k; ++one.settled)
        count_exactly(parts[one.settled], index, exact, place);
      if (one.certain < call_.k && one.certain + one.may >= call_.k) count_exactly(rest, index, exact, place);
      one.refuted = one.certain >= call_.k;
    });
  }

  template <typename Decide>
  void settle(const std::vector<int32_t>& some, const Decide& decide) {
    constexpr int64_t kSome = ExactProducts<T>::kPatches;
    const int64_t count = static_cast<int64_t>(some.size()), groups = divide_up(count, kSome);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, groups, 1, [&](int64_t, int64_t) {
      ExactProducts<T> exact(call_, x_);
      for (int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < groups;) {
        const int64_t first = group * kSome, filled = std::min(kSome, count - first);
        int64_t patches[kSome];
        for (int64_t i = 0; i < filled; ++i) patches[i] = patches_[some[first + i]];
        exact.take(patches, filled);
        for (int64_t i = 0; i < filled; ++i) decide(candidates_[some[first + i]], exact, some[first + i], i);
      }
    });
  }

  // Counts those latents of a part that exceed the value of a candidate, which has not had them and is the `taken`-th
  // of `exact`.
  void count_exactly(const Part& part, int32_t index, ExactProducts<T>& exact, int64_t taken) {
    Candidate& one = candidates_[index];
    const auto [panel, lane] = lane_of(part, index);
    const int64_t size = part.stop - part.start;
    const uint32_t *bits = part.bits.get() + panel * size, own = uint32_t{1} << lane;
    const float value = largest_.value[patches_[index]];
    int64_t some[kChains], found = 0;
    const auto count_found = [&] {
      one.certain += static_cast<int32_t>(exact.exceeding(some, found, taken, value));
      one.counted += static_cast<int32_t>(found);
      one.may -= static_cast<int32_t>(found);
      found = 0;
    };
    for (int64_t l = next_with(bits, 0, size, own); l < size && one.certain < call_.k;
         l = next_with(bits, l + 1, size, own)) {
      some[found++] = part.start + l;
      exact.fetch(part.start + l);
      if (found == kChains) count_found();
    }
    if (found > 0 && one.certain < call_.k) count_found();
  }

  static std::pair<int64_t, int64_t> lane_of(const Part& part, int32_t candidate) {
    for (size_t p = 0; p < part.lanes.size(); ++p) {
      const auto& lanes = part.lanes[p];
      const auto found = std::find(lanes.begin(), lanes.end(), candidate);
      if (found != lanes.end()) return {static_cast<int64_t>(p), found - lanes.begin()};
    }
    STD_TORCH_CHECK(false, "detect_patches: a candidate without a lane");
  }

  const DetectCall& call_;
  const FeatureMap<T>& x_;
  const Largest& largest_;
  const Screen& screen_;
  std::vector<int64_t> patches_;  // of the candidates, in B * N
  std::vector<Candidate> candidates_;
};

}  // namespace lbdt
