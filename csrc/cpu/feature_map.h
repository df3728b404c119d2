// Reads x - minus of a feature map [B, d, H, W] or [B, d, N], and a dictionary [L, d], of any strides, as
// float32 rows or columns.

#pragma once

#include "tiles.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lbdt {

using Floats = std::unique_ptr<float[], decltype(&std::free)>;

// Uninitialized, at the start of a cache line.
inline Floats floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) / 64 + 1) * 64;
  void* memory = std::aligned_alloc(64, bytes);
  STD_TORCH_CHECK(memory != nullptr, "out of memory for ", bytes, " bytes");
  return {static_cast<float*>(memory), &std::free};
}

// Memory that grows with the input: from torch's allocator, whose profiler counts it; at the start of a cache line.
template <typename T>
class Columns {
  static_assert(sizeof(T) == 4);

 public:
  explicit Columns(int64_t count)
      : tensor_(torch::stable::empty({std::max<int64_t>(count, 1)}, torch::headeronly::ScalarType::Int)) {}
  T* get() const { return static_cast<T*>(tensor_.mutable_data_ptr()); }

 private:
  torch::stable::Tensor tensor_;
};

#if defined(__x86_64__)
__attribute__((target("avx2,f16c"))) inline int64_t widen_f16c(
    const torch::headeronly::Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}
#endif

// `count` elements, `step` apart, as float32. Without F16C, float16 is converted in software: slowly.
template <typename T>
void widen(const T* from, int64_t step, int64_t count, float* to) {
  int64_t i = 0;
  if (step == 1) {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
      static const bool has_f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
      if (has_f16c) i = widen_f16c(from, count, to);
    }
#endif
    for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    for (; i < count; ++i) to[i] = static_cast<float>(from[i * step]);
  }
}

// Latents [first, first + count) of a dictionary [L, d], each the row `order` [L] of `weight` where there is one: in
// place, or in `room` [count, d].
template <typename T>
Rows dictionary_rows(
    const torch::stable::Tensor& weight, const int64_t* order, int64_t first, int64_t count, float* room) {
  const int64_t step = weight.stride(0), inner = weight.stride(1), width = weight.size(1);
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  const auto row = [&](int64_t latent) { return from + (order ? order[latent] : latent) * step; };
  if constexpr (std::is_same_v<T, float>)
    if (inner == 1 && (!order || count == 1)) return {row(first), step};
  for (int64_t r = 0; r < count; ++r) widen(row(first + r), inner, width, room + r * width);
  return {room, width};
}

struct Panel {  // patches side by side, [d, lanes]
  float* data;
  int64_t lanes, filled;
  int64_t patch[kMostLanes];  // positions in B * N
};

template <typename T>
class FeatureMap {
 public:
  FeatureMap(const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& minus)
      : images(x.size(0)), width(x.size(1)), x_(x), minus_(minus ? Map(*minus) : Map()) {
    patches = static_cast<int64_t>(x_.at.size());
  }

  int64_t images, width, patches;  // B, d, N

  // Whether all of a patch is, in x and in minus.
  bool is_finite(int64_t image, int64_t patch) const {
    const auto all = [&](const Map& map) {
      const T* from = map.find(image, patch);
      for (int64_t c = 0; c < width; ++c)
        if (!std::isfinite(static_cast<float>(from[c * map.channel]))) return false;
      return true;
    };
    return all(x_) && (!minus_.data || all(minus_));
  }

  // A patch is one run of memory, and patches are not: they are read fastest as rows.
  bool in_rows() const { return x_.channel == 1 && x_.step != 1; }

  // `count` patches of an image from `start` on, as rows of d: in place, or in `room` [count, d].
  Rows rows(int64_t image, int64_t start, int64_t count, float* room) const {
    if constexpr (std::is_same_v<T, float>)
      if (!minus_.data && x_.channel == 1 && x_.step >= 0) return {x_.find(image, start), x_.step};
    std::vector<float> less(minus_.data ? width : 0);
    for (int64_t i = 0; i < count; ++i) {
      float* to = room + i * width;
      widen(x_.find(image, start + i), x_.channel, width, to);
      if (!minus_.data) continue;
      widen(minus_.find(image, start + i), minus_.channel, width, less.data());
      for (int64_t c = 0; c < width; ++c) to[c] -= less[c];
    }
    return {room, width};
  }

  // The same patches as columns of a panel: in place, or in `room` [d, lanes].
  Rows columns(int64_t image, int64_t start, int64_t count, int64_t lanes, float* room) const {
    if constexpr (std::is_same_v<T, float>)
      if (!minus_.data && x_.step == 1 && count == lanes) return {x_.find(image, start), x_.channel};
    int64_t patch[kMostLanes];
    for (int64_t i = 0; i < count; ++i) patch[i] = image * patches + start + i;
    pack(patch, count, 0, width, lanes, room);
    return {room, lanes};
  }

  // The patches at `where`, ascending positions in B * N, as panels one after another in `packed`.
  std::vector<Panel> panels(const std::vector<int64_t>& where, float* packed) const {
    const Kernels& isa = kernels();
    const int64_t vectors = divide_up(where.size(), isa.lanes);
    std::vector<Panel> out(divide_up(vectors, isa.vectors));
    int64_t lane = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      Panel& panel = out[i];
      // Evenly wide: a narrow panel is a slow one.
      panel.lanes = divide_up(vectors - lane / isa.lanes, out.size() - i) * isa.lanes;
      panel.filled = std::min<int64_t>(panel.lanes, where.size() - lane);
      panel.data = packed + lane * width;
      std::copy_n(where.begin() + lane, panel.filled, panel.patch);
      lane += panel.lanes;
    }
    torch::stable::parallel_for(0, width, 1 + kGrain / (8 * lane + 1), [&](int64_t first, int64_t last) {
      for (const Panel& p : out) pack(p.patch, p.filled, first, last, p.lanes, p.data);
    });
    return out;
  }

  // Channels [first, last) of `count` patches, ascending positions in B * N, into panel [d, lanes]; the other
  // lanes are zeros.
  void pack(
      const int64_t* patch, int64_t count, int64_t first, int64_t last, int64_t lanes, float* panel) const {
    const T* from[kMostLanes];
    const T* less[kMostLanes];
    for (int64_t i = 0; i < count; ++i) {
      from[i] = x_.find(patch[i] / patches, patch[i] % patches);
      if (minus_.data) less[i] = minus_.find(patch[i] / patches, patch[i] % patches);
    }
    const bool together =
        patch[count - 1] - patch[0] == count - 1 && patch[0] / patches == patch[count - 1] / patches;
    float other[kMostLanes];
    for (int64_t c = first; c < last; ++c) {
      float* to = panel + c * lanes;
      read(from, c * x_.channel, count, together && x_.step == 1, to);
      if (minus_.data) {
        read(less, c * minus_.channel, count, together && minus_.step == 1, other);
        for (int64_t i = 0; i < count; ++i) to[i] -= other[i];
      }
      std::fill(to + count, to + lanes, 0.0f);
    }
  }

 private:
  struct Map {  // where the elements lie
    Map() = default;
    explicit Map(const torch::stable::Tensor& t)
        : data(static_cast<const T*>(t.const_data_ptr())), image(t.stride(0)), channel(t.stride(1)) {
      const bool grid = t.dim() == 4;
      for (int64_t y = 0; y < t.size(2); ++y)
        for (int64_t x = 0; x < (grid ? t.size(3) : 1); ++x)
          at.push_back(y * t.stride(2) + (grid ? x * t.stride(3) : 0));
      step = at.size() > 1 ? at[1] : 1;
      for (size_t p = 0; p < at.size(); ++p)
        if (at[p] != static_cast<int64_t>(p) * step) step = -1;
    }
    const T* find(int64_t b, int64_t p) const { return data + b * image + at[p]; }

    const T* data = nullptr;
    int64_t image = 0, channel = 0;
    int64_t step = -1;        // from a patch to the next; -1 where that is not the same for all
    std::vector<int64_t> at;  // of each patch, from the first
  };

  static void read(const T* const* from, int64_t offset, int64_t count, bool together, float* to) {
    if (together) return widen(from[0] + offset, 1, count, to);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i][offset]);
  }

  Map x_, minus_;
};

}  // namespace lbdt
