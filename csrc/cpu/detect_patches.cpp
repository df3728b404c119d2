// detect_patches on CPU tensors: what lbdt/reference/detect_patches.py computes, in float32.
// Schema, checks and fake: lbdt/ops/detect_patches.py.
//
// Eq.: METHOD.md, 2.2; arXiv 2606.31699. With h = weight (x - minus) + bias,
// m = max{ h_u : h_u > mu_u } over the watched latents of a patch and u* the latent that has it, the patch is
// detected iff m > -inf and, for k > 0, #{ j != u* : h_j > m } < k.
// With `least`, the gate (METHOD.md, 2.5 and 2.6): patches that are evidence only for concepts of which the deciding
// row has too few are taken away.
// 2 N U d flops for m, then 2 C L d for the C patches with m > -inf (candidates), less where counts reach k
// early. Reads x once and, where there is a candidate, the dictionary once. Holds C d floats.

#include "checks.h"
#include "comparisons.h"
#include "detection.h"
#include "feature_map.h"
#include "gate.h"
#include "tiles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using lbdt::count_larger;
using lbdt::DetectCall;
using lbdt::divide_up;
using lbdt::FeatureMap;
using lbdt::Floats;
using lbdt::floats;
using lbdt::Gate;
using lbdt::keep_evidence;
using lbdt::keep_largest;
using lbdt::kBlock;
using lbdt::kernels;
using lbdt::kGrain;
using lbdt::kMostLanes;
using lbdt::product;
using lbdt::Rows;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kZeros[kBlock] = {};

template <typename T>
class Detection {
 public:
  Detection(const DetectCall& call, const FeatureMap<T>& x)
      : call_(call),
        x_(x),
        largest_(x.images * x.patches, -kInf),
        owner_(x.images * x.patches),
        evidence_(call.gate ? call.gate->concepts * x.images * x.patches : 0),
        odd_(call.not_finite ? x.images * x.patches : 0, 1) {}

  void run() {
    find_largest();
    std::vector<int64_t> alive;
    for (int64_t p = 0; p < x_.images * x_.patches; ++p) {
      call_.mask[p] = largest_[p] > -kInf;
      if (call_.mask[p]) alive.push_back(p);
    }
    if (call_.k > 0) rank(alive);
    if (call_.gate) call_.gate->close(call_.mask, evidence_.data(), call_.bins, x_.images, x_.patches);
    if (call_.not_finite) count_not_finite();
  }

 private:
  struct Watched {  // the U latents of the concepts
    Floats weight;             // [U, d]
    std::vector<float> bias;   // [U]
    std::vector<float> floor;  // [B, U], +inf where a latent does not count
    std::vector<int64_t> end;  // [B], the latents that need be looked at: none behind it counts
  };

  Watched watch() const {
    const int64_t count = call_.union_size, width = x_.width;
    Watched own{floats(count * width), {}, {}, {}};
    for (int64_t u = 0; u < count; ++u) {
      float* to = own.weight.get() + u * width;
      const Rows row = lbdt::dictionary_rows<T>(call_.weight, call_.latents[u], 1, to);
      if (row.data != to) std::copy_n(row.data, width, to);
      own.bias.push_back(call_.bias[call_.latents[u]]);
    }
    for (int64_t b = 0; b < x_.images; ++b) {
      own.end.push_back(std::min<int64_t>(count, call_.not_finite != nullptr));  // the first tells odd patches
      for (int64_t u = 0; u < count; ++u) {
        own.floor.push_back(
            call_.enabled[b * count + u] ? call_.thresholds[call_.bins[b] * count + u] : kInf);
        if (own.floor.back() < kInf) own.end[b] = u + 1;
      }
    }
    return own;
  }

  // Fills largest_ and owner_.
  void find_largest() {
    const Watched own = watch();
    const int64_t lanes = kernels().lanes * kernels().vectors;
    const int64_t size = x_.in_rows() ? kBlock / 2 : lanes;  // patches of a task
    const int64_t tasks = divide_up(x_.patches, size);
    const Floats turned = x_.in_rows() ? turn(own.weight.get(), lanes) : floats(0);
    const int64_t grain = 1 + kGrain / (1 + size * call_.union_size * x_.width);
    parallel_for(0, x_.images * tasks, grain, [&](int64_t begin, int64_t end) {
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

  // h [latents, patches]: the patches are the columns.
  void largest_in_columns(
      const Watched& own, int64_t image, int64_t start, int64_t count, float* room, float* h) {
    const int64_t lanes = divide_up(count, kernels().lanes) * kernels().lanes;
    const Rows panel = x_.columns(image, start, count, lanes, room);
    float* largest = largest_.data() + image * x_.patches + start;
    int32_t* owner = owner_.data() + image * x_.patches + start;
    for (int64_t u = 0; u < own.end[image]; u += kBlock) {
      const int64_t some = std::min(kBlock, own.end[image] - u);
      const Rows rows{own.weight.get() + u * x_.width, x_.width};
      product(rows, own.bias.data() + u, some, panel.data, panel.step, x_.width, h, lanes);
      if (u == 0) keep_odd(h, 1, image * x_.patches + start, count);
      for (int64_t r = 0; r < some; ++r) {
        const float floor = own.floor[image * call_.union_size + u + r];
        keep_largest(
            h + r * lanes, count, floor, static_cast<int32_t>(call_.latents[u + r]), largest, owner);
        if (call_.gate) keep_evidence(h + r * lanes, count, floor, evidence(u + r, image * x_.patches + start));
      }
    }
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
      const int64_t some = std::min(most, call_.union_size - u);
      const int64_t lanes = divide_up(some, kernels().lanes) * kernels().lanes;
      product(rows, kZeros, count, turned + u * x_.width, lanes, x_.width, h, lanes);
      if (u == 0) keep_odd(h, lanes, image * x_.patches + start, count);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < some; ++r) {
          const int64_t patch = image * x_.patches + start + i;
          const float value = h[i * lanes + r] + own.bias[u + r];
          if (!(value > own.floor[image * call_.union_size + u + r])) continue;
          if (call_.gate) *evidence(u + r, patch) = 1;
          if (value > largest_[patch]) {
            largest_[patch] = value;
            owner_[patch] = static_cast<int32_t>(call_.latents[u + r]);
          }
        }
    }
  }

  // Keeps which patches have a pre-activation, `step` apart, that is not finite: a NaN or infinity among the channels
  // never leaves the sum.
  void keep_odd(const float* h, int64_t step, int64_t patch, int64_t count) {
    if (!call_.not_finite) return;
    for (int64_t i = 0; i < count; ++i) odd_[patch + i] = !std::isfinite(h[i * step]);
  }

  // Sums of finite values may overflow, so odd patches are read again.
  void count_not_finite() const {
    for (int64_t b = 0; b < x_.images; ++b) {
      call_.not_finite[b] = 0;
      for (int64_t p = 0; p < x_.patches; ++p)
        call_.not_finite[b] += odd_[b * x_.patches + p] && !x_.is_finite(b, p);
    }
  }

  // Whether a patch is evidence for the concept of a watched latent; the next patches follow.
  uint8_t* evidence(int64_t watched, int64_t patch) {
    return evidence_.data() + call_.gate->owners[watched] * x_.images * x_.patches + patch;
  }

  // The rows of w [U, d] as the columns of panels [d, most] side by side in memory; zeros in the lanes left.
  Floats turn(const float* w, int64_t most) const {
    const int64_t width = x_.width;
    Floats out = floats(divide_up(call_.union_size, most) * most * width);
    for (int64_t u = 0; u < call_.union_size; u += most) {
      const int64_t some = std::min(most, call_.union_size - u);
      const int64_t lanes = divide_up(some, kernels().lanes) * kernels().lanes;
      float* to = out.get() + u * width;
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = 0; i < lanes; ++i) to[c * lanes + i] = i < some ? w[(u + i) * width + c] : 0.0f;
    }
    return out;
  }

  struct Panel : lbdt::Panel {  // of candidates
    float value[kMostLanes];    // +inf, which nothing exceeds, in the lanes left
    int32_t owner[kMostLanes];
  };

  // Clears the mask of those `alive` that at least k other latents exceed. Between parts of the dictionary,
  // each as long as all before it, the patches whose count is full are dropped.
  void rank(std::vector<int64_t> alive) const {
    const int64_t latents = call_.weight.size(0), lanes = kernels().lanes;
    const int64_t least = std::max<int64_t>(4 * call_.k, kBlock * torch::stable::get_num_threads());
    std::vector<std::atomic<int32_t>> counts(alive.empty() ? 0 : x_.images * x_.patches);
    const lbdt::Columns packed(divide_up(alive.size(), lanes) * lanes * x_.width);
    std::vector<Panel> panels;
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

  std::vector<Panel> pack(const std::vector<int64_t>& alive, float* packed) const {
    std::vector<Panel> panels;
    for (const lbdt::Panel& plain : x_.panels(alive, packed)) {
      Panel& panel = panels.emplace_back(Panel{plain, {}, {}});
      std::fill_n(panel.value, kMostLanes, kInf);
      std::fill_n(panel.owner, kMostLanes, -1);
      for (int64_t j = 0; j < panel.filled; ++j) {
        panel.value[j] = largest_[panel.patch[j]];
        panel.owner[j] = owner_[panel.patch[j]];
      }
    }
    return panels;
  }

  // Adds to each patch's count the latents of [start, stop), but its owner, that exceed its value.
  void count(
      const std::vector<Panel>& panels,
      int64_t start,
      int64_t stop,
      std::vector<std::atomic<int32_t>>& counts) const {
    const int64_t tasks = divide_up(stop - start, kBlock);
    const int64_t work = kBlock * x_.width * static_cast<int64_t>(panels.size()) * kMostLanes;
    const auto open = [&](int64_t p) { return counts[p].load(std::memory_order_relaxed) < call_.k; };
    std::atomic<int64_t> next{0};  // taken one by one: the cores may be shared, and unequally fast
    parallel_for(0, tasks, 1 + kGrain / (1 + work), [&](int64_t, int64_t) {
      const Floats room = floats(kBlock * x_.width), h = floats(kBlock * kMostLanes);
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t first = start + task * kBlock, some = std::min(kBlock, stop - first);
        const Rows w = lbdt::dictionary_rows<T>(call_.weight, first, some, room.get());
        for (const Panel& p : panels) {
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
  std::vector<float> largest_;  // [B * N], -inf where no watched latent is above its threshold
  std::vector<int32_t> owner_;
  std::vector<uint8_t> evidence_;  // [C, B * N]; empty without a gate
  std::vector<uint8_t> odd_;       // [B * N], whether a patch may hold a NaN or infinity; empty where not asked for
};

template <typename T>
void detect_in(const Tensor& x, const std::optional<Tensor>& minus, const DetectCall& call) {
  const FeatureMap<T> map(x, minus);
  Detection<T>(call, map).run();
}

}  // namespace

void lbdt::detect(const Tensor& x, const std::optional<Tensor>& minus, const DetectCall& call) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return detect_in<float>(x, minus, call);
    case ScalarType::Half: return detect_in<torch::headeronly::Half>(x, minus, call);
    case ScalarType::BFloat16: return detect_in<torch::headeronly::BFloat16>(x, minus, call);
    default: STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

namespace {

void detect_patches_cpp(
    const Tensor x,             // [B, d, H, W] or [B, d, N], any strides
    const Tensor weight,        // [L, d] dtype of x, any strides
    const Tensor bias,          // [L] float32, contiguous
    const Tensor latents,       // [U] int64, contiguous, in [0, L)
    const Tensor thresholds,    // [T, U] float32, contiguous
    const Tensor timestep_bin,  // [B] int64, contiguous, in [0, T)
    const Tensor enabled,       // [B, U] bool, contiguous
    int64_t k,
    std::optional<Tensor> minus,     // like x
    std::optional<Tensor> owners,    // [U] int64, contiguous, in [0, C)
    std::optional<Tensor> least,     // [T, C] int64, contiguous
    int64_t least_of,                // in [0, 2^30]
    std::optional<Tensor> deciding,  // [B] int64, contiguous, in [0, B)
    std::optional<Tensor> gated,     // [B] int64, contiguous
    std::optional<Tensor> so_far,    // [B, C + 1] int64, contiguous
    Tensor mask) {                   // [B, N] bool, contiguous
  const auto [map, rows, start] = lbdt::check_encoder(x, weight, bias, k, 0);
  const int64_t batch = x.size(0), some = latents.dim() == 1 ? latents.size(0) : 0;
  const int64_t bins = thresholds.dim() == 2 ? thresholds.size(0) : 0;
  const lbdt::Span watched = lbdt::check("latents", latents, x, ScalarType::Long, {some});
  const lbdt::Span floors = lbdt::check("thresholds", thresholds, x, ScalarType::Float, {bins, some});
  const lbdt::Span times = lbdt::check("timestep_bin", timestep_bin, x, ScalarType::Long, {batch});
  const lbdt::Span on = lbdt::check("enabled", enabled, x, ScalarType::Bool, {batch, some});
  const lbdt::Span own = lbdt::check("mask", mask, x, ScalarType::Bool, {batch, lbdt::patches(x)});
  lbdt::check_within("latents", latents, weight.size(0));
  lbdt::check_within("timestep_bin", timestep_bin, bins);
  lbdt::Span less;
  if (minus) {
    const auto sizes = x.sizes();
    const bool same = std::equal(sizes.begin(), sizes.end(), minus->sizes().begin(), minus->sizes().end());
    STD_TORCH_CHECK(same && minus->scalar_type() == x.scalar_type(), "minus: expected the sizes and dtype of x");
    less = lbdt::check_memory("minus", *minus, x);
  }
  std::optional<Gate> gate;
  lbdt::Span owned, needed, decided, taken, sums;
  if (least) {
    STD_TORCH_CHECK(owners.has_value(), "owners: expected a tensor, as least is one");
    gate = Gate(x, some, bins, *owners, *least, least_of, deciding, gated, so_far);
    std::tie(owned, needed, decided, taken, sums) = gate->spans;
    lbdt::check_apart(
        "gated", taken, {map, rows, start, watched, floors, times, on, less, own, owned, needed, decided, sums});
    lbdt::check_apart(
        "so_far", sums, {map, rows, start, watched, floors, times, on, less, own, owned, needed, decided});
  }
  lbdt::check_apart("mask", own, {map, rows, start, watched, floors, times, on, less, owned, needed, decided});
  if (mask.numel() == 0) {
    const auto* bin = static_cast<const int64_t*>(timestep_bin.const_data_ptr());
    if (gate) gate->close(static_cast<bool*>(mask.mutable_data_ptr()), nullptr, bin, batch, lbdt::patches(x));
    return;
  }
  const DetectCall call{
      weight,
      static_cast<const float*>(bias.const_data_ptr()),
      static_cast<const int64_t*>(latents.const_data_ptr()),
      static_cast<const float*>(thresholds.const_data_ptr()),
      static_cast<const int64_t*>(timestep_bin.const_data_ptr()),
      static_cast<const uint8_t*>(enabled.const_data_ptr()),
      latents.size(0),
      k,
      static_cast<bool*>(mask.mutable_data_ptr()),
      gate};
  lbdt::detect(x, minus, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("detect_patches_cpp", TORCH_BOX(&detect_patches_cpp));
}
