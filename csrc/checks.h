// What every op asks of its arguments before it follows a pointer, shared by csrc/cpu and csrc/cuda. The wrappers in
// lbdt/ops say more in their errors, and never come here with less; a call of torch.ops.lbdt.*_cpp may.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace lbdt {

// Sizes, positions and their products with a few tiles' worth stay within int64 below it.
constexpr int64_t kMostChannels = int64_t{1} << 31;
// So that the sum of a patch's position and the padding, at most a side of the grid, is an int.
constexpr int64_t kMostPatches = int64_t{1} << 30;

// The bytes from a tensor's first element to the end of its last; of none: empty.
struct Span {
  const char *begin = nullptr, *end = nullptr;
  Span() = default;
  explicit Span(const torch::stable::Tensor& t) : begin(static_cast<const char*>(t.const_data_ptr())), end(begin) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) return;
      last += (sizes[i] - 1) * strides[i];
    }
    end += (last + 1) * static_cast<int64_t>(t.element_size());
  }
  bool meets(const Span& other) const {
    return begin != end && other.begin != other.end && begin < other.end && other.begin < end;
  }
};

inline std::string list(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// `t` lies in its storage, which may have been freed or shrunk, and where `like` does.
inline Span check_memory(const char* name, const torch::stable::Tensor& t, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(
      t.is_cuda() == like.is_cuda() && (!t.is_cuda() || t.get_device_index() == like.get_device_index()), name,
      ": expected on the device of the first argument");
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const Span span(t);
  const int64_t needed = span.end - span.begin;
  STD_TORCH_CHECK(
      needed == 0 || t.storage_offset() * static_cast<int64_t>(t.element_size()) + needed <= bytes, name,
      ": its storage of ", bytes, " bytes is smaller than the tensor");
  return span;
}

// A tensor of these sizes and dtype, on the device of `like`.
inline Span check(
    const char* name,
    const torch::stable::Tensor& t,
    const torch::stable::Tensor& like,
    torch::headeronly::ScalarType dtype,
    std::initializer_list<int64_t> sizes,
    bool contiguous = true) {
  const auto given = t.sizes();
  STD_TORCH_CHECK(
      given.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), given.data()), name, ": expected ",
      list(sizes.begin(), sizes.size()), ", got ", list(given.data(), given.size()));
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(!contiguous || t.is_contiguous(), name, ": expected contiguous memory");
  return check_memory(name, t, like);
}

// A feature map [B, d, H, W] or, where `flat`, [B, d, N] too.
inline Span check_feature_map(const torch::stable::Tensor& x, bool flat) {
  STD_TORCH_CHECK(
      x.dim() == 4 || (flat && x.dim() == 3), "x: expected [B, d, H, W]", flat ? " or [B, d, N]" : "", ", got ",
      list(x.sizes().data(), x.sizes().size()));
  STD_TORCH_CHECK(x.size(1) < kMostChannels, "x: expected fewer than 2^31 channels, got ", x.size(1));
  return check_memory("x", x, x);
}

// The patches of an image of `x`.
inline int64_t patches(const torch::stable::Tensor& x) { return x.dim() == 4 ? x.size(2) * x.size(3) : x.size(2); }

// The spans of x and an encoder for it: weight [L, d] of its dtype, any strides, and bias [L] float32; `k` of its
// latents, or `least`.
inline std::array<Span, 3> check_encoder(
    const torch::stable::Tensor& x,
    const torch::stable::Tensor& weight,
    const torch::stable::Tensor& bias,
    int64_t k,
    int64_t least) {
  const Span map = check_feature_map(x, true);
  STD_TORCH_CHECK(x.size(1) > 0, "x: expected d >= 1 channels, got 0");
  const int64_t latents = weight.dim() == 2 ? weight.size(0) : 0;
  const Span rows = check("weight", weight, x, x.scalar_type(), {latents, x.size(1)}, false);
  STD_TORCH_CHECK(latents < int64_t{1} << 30, "weight: expected L < 2^30, got ", latents);
  const Span start = check("bias", bias, x, torch::headeronly::ScalarType::Float, {latents});
  STD_TORCH_CHECK(least <= k && k <= latents, "k: expected ", least, " <= k <= L = ", latents, ", got ", k);
  return {map, rows, start};
}

// int64 values on the CPU that serve as positions.
inline void check_within(const char* name, const int64_t* values, int64_t size, int64_t count) {
  for (int64_t i = 0; i < size; ++i)
    STD_TORCH_CHECK(
        0 <= values[i] && values[i] < count, name, ": expected values in [0, ", count, "), got ", values[i]);
}

inline void check_within(const char* name, const torch::stable::Tensor& t, int64_t count) {
  check_within(name, static_cast<const int64_t*>(t.const_data_ptr()), t.numel(), count);
}

// What an op writes shares no memory with its other arguments.
inline void check_apart(const char* name, const Span& written, std::initializer_list<Span> others) {
  for (const Span& other : others)
    STD_TORCH_CHECK(!written.meets(other), name, ": it is written, and shares memory with another argument");
}

// `t`, or a copy of it where writing `written` would change it.
inline torch::stable::Tensor apart(const torch::stable::Tensor& t, const Span& written) {
  return Span(t).meets(written) ? torch::stable::clone(t) : t;
}

// A feature map of `batch` images with a grid of `count` patches; `keys`: whether donors are ordered by distance.
inline void check_grid(int64_t batch, int64_t height, int64_t width, int64_t count, bool keys) {
  STD_TORCH_CHECK(batch < kMostChannels, "x: expected fewer than 2^31 images, got ", batch);
  STD_TORCH_CHECK(
      std::max({height, width, count}) <= kMostPatches, "x: expected at most 2^30 patches, got ", height, " x ", width);
  STD_TORCH_CHECK(
      !keys || (static_cast<double>(height) * height + static_cast<double>(width) * width) * count < 0x1p63,
      "x: expected a grid whose squared distances times patches fit an int64, got ", height, " x ", width);
}

// The arguments of replace_patches_cpp; `out` is x itself in place, and the others are `apart` from it.
inline void check_replace_patches(
    const torch::stable::Tensor& x,
    const torch::stable::Tensor& mask,
    const torch::stable::Tensor& u,
    const std::optional<torch::stable::Tensor>& bank,
    const std::optional<torch::stable::Tensor>& avoid,
    int64_t padding,
    bool keys,  // whether donors are ordered by distance
    const torch::stable::Tensor& out,
    const torch::stable::Tensor& replaced,
    bool in_place) {
  using torch::headeronly::ScalarType;
  const Span map = check_feature_map(x, false);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
          dtype == ScalarType::BFloat16,
      "x: expected float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3), count = patches(x);
  check_grid(batch, height, width, count, keys);
  STD_TORCH_CHECK(padding >= 0, "padding: expected >= 0, got ", padding);
  const Span where = check("mask", mask, x, ScalarType::Bool, {batch, count});
  const Span numbers = check("u", u, x, ScalarType::Float, {batch, count});
  const Span taken = check("replaced", replaced, x, ScalarType::Bool, {batch, count});
  const Span shunned = avoid ? check("avoid", *avoid, x, ScalarType::Bool, {batch, count}) : Span();
  Span spare;
  if (bank) {
    const int64_t rows = bank->dim() == 3 ? bank->size(1) : 0;
    spare = check("bank", *bank, x, x.scalar_type(), {batch, rows, channels});
    STD_TORCH_CHECK(0 < rows && rows < kMostChannels, "bank: expected 1 <= M < 2^31, got ", rows);
  }
  if (!in_place) {
    const Span result = check("out", out, x, x.scalar_type(), {batch, channels, height, width}, false);
    check_apart("out", result, {map, where, numbers, spare, shunned, taken});
  }
  check_apart("replaced", taken, {map, where, numbers, spare, shunned});
}

// The arguments of patch_uniform_cpp but for the dtype of `timesteps`.
inline void check_patch_uniform(
    const torch::stable::Tensor& seeds,
    const torch::stable::Tensor& timesteps,
    const torch::stable::Tensor& halves,
    const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  const int64_t batch = seeds.dim() == 1 ? seeds.size(0) : 0, count = out.dim() == 2 ? out.size(1) : 0;
  const Span key = check("seeds", seeds, seeds, ScalarType::Long, {batch}, false);
  const Span time = check("timesteps", timesteps, seeds, timesteps.scalar_type(), {batch}, false);
  const Span half = check("halves", halves, seeds, ScalarType::Long, {batch}, false);
  check_apart("out", check("out", out, seeds, ScalarType::Float, {batch, count}), {key, time, half});
}

}  // namespace lbdt
