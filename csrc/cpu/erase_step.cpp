// erase_step on CPU tensors: what lbdt/reference/erase_step.py computes, in one call.
// Schema, checks and fake: lbdt/ops/erase_step.py.
//
// Eq.: METHOD.md, 2.2, 2.5, 2.6 and 4.1 to 4.4; arXiv 2606.31699. The cores are those of detect_patches,
// replace_patches and record_patches; here are the rows of the call, the run's memory, and what need not be done: no
// number is drawn but for a patch that needs one, no row without a detected patch is looked at for known latents, and
// where nothing is replaced nothing is copied. Without a candidate it reads x once and writes 40 bytes a row (8 more
// with the gate).

#include "call_rows.h"
#include "checks.h"
#include "detection.h"
#include "gate.h"
#include "recording.h"
#include "replacement.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace {

using lbdt::CallRows;
using lbdt::Gate;
using lbdt::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* written_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// What is kept between the calls of a run: of each image the sums of its evidence and calls, and its last timestep.
struct RunMemory {
  int64_t* sums;   // [R, C + 1]
  float* last;     // [R]
  int64_t* count;  // images of the call before
  int64_t images, concepts;
  bool whole_calls;

  // The sums [B, C + 1] that a call begins with.
  std::vector<int64_t> begin(const CallRows& rows) const {
    std::vector<int64_t> out(rows.batch * (concepts + 1));
    for (int64_t b = 0; b < rows.batch; ++b) {
      const int64_t image = b % images;
      const float now = rows.times[image];
      const bool begins = (whole_calls ? now > last[image] : now >= last[image]) || *count != images;
      if (!begins) std::copy_n(sums + image * (concepts + 1), concepts + 1, out.data() + b * (concepts + 1));
    }
    return out;
  }

  // Keeps what it has made of them, which is the same in every branch.
  void keep(const CallRows& rows, const std::vector<int64_t>& so_far) const {
    std::copy_n(so_far.data(), images * (concepts + 1), sums);
    for (int64_t b = 0; b < images; ++b)
      last[b] = rows.inside[b] ? rows.times[b] : -std::numeric_limits<float>::infinity();
    *count = images;
  }
};

Tensor erase_step_cpp(
    const Tensor x,           // [B, d, H, W] or [B, d, N], any strides
    const Tensor timesteps,   // [B], any dtype of patch_uniform and any stride
    const Tensor weight,      // [L, d] dtype of x, any strides
    const Tensor bias,        // [L] float32, contiguous, as all that follows but for `schedule`
    const Tensor latents,     // [U] int64, in [0, L)
    const Tensor thresholds,  // [T, U] float32
    const Tensor times,       // [T] float32
    const Tensor enabled,     // [S, U] bool
    const Tensor seeds,       // [R] int64
    int64_t k,
    int64_t images,
    int64_t height,
    int64_t width,
    int64_t sizes,
    Tensor rows,     // [*, 5] int64, one more with least
    Tensor cells,    // [*] uint8
    Tensor written,  // [2] int64
    std::optional<Tensor> minus,             // like x
    std::optional<Tensor> bank,              // [T, M, d] dtype of x
    std::optional<Tensor> known_latents,     // [V] int64, in [0, L)
    std::optional<Tensor> known_thresholds,  // [T, V] float32
    int64_t padding,
    int64_t source,
    std::optional<Tensor> owners,  // [U] int64, in [0, C)
    std::optional<Tensor> least,   // [T, C] int64
    int64_t least_of,
    int64_t cond,
    int64_t counted,
    std::optional<Tensor> schedule,  // [*], as timesteps
    int64_t first,
    int64_t last,
    std::optional<Tensor> run_sums,   // [*, C + 1] int64
    std::optional<Tensor> run_last,   // [*] float32
    std::optional<Tensor> run_count,  // int64
    bool whole_calls,
    std::optional<Tensor> codes,   // [L, d] int8, contiguous as what follows, d a multiple of 4 by zeros
    std::optional<Tensor> bounds,  // [6, L] float32
    std::optional<Tensor> centre,  // [d] float32
    std::optional<Tensor> order) {  // [L] int64, in [0, L)
  const auto encoder = lbdt::check_encoder(x, weight, bias, k, 0);
  const int64_t batch = x.size(0), count = lbdt::patches(x), watched = latents.dim() == 1 ? latents.size(0) : 0;
  const int64_t bins = thresholds.dim() == 2 ? thresholds.size(0) : 0, sets = enabled.dim() == 2 ? enabled.size(0) : 0;
  const bool grid_fits = x.dim() == 3 || (x.size(2) == height && x.size(3) == width);
  STD_TORCH_CHECK(
      height >= 0 && width >= 0 && height <= lbdt::kMostPatches && width <= lbdt::kMostPatches &&
          height * width == count && grid_fits,
      "height, width: expected the grid of x, got ", height, " x ", width);
  lbdt::check_grid(batch, height, width, count, source != lbdt::kRandom);
  STD_TORCH_CHECK(source >= lbdt::kRandom && source <= lbdt::kRow, "source: expected 0 to 3, got ", source);
  STD_TORCH_CHECK(padding >= 0, "padding: expected >= 0, got ", padding);
  STD_TORCH_CHECK(
      images > 0 && images <= std::max<int64_t>(batch, 1) && batch % images == 0,
      "images: expected a divisor of the ", batch, " rows of x, got ", images);
  STD_TORCH_CHECK(
      -1 <= cond && cond < std::max<int64_t>(batch / images, 1), "cond: expected -1 or a branch, got ", cond);

  std::vector<Span> read(encoder.begin(), encoder.end());
  const auto reads = [&](const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
    read.push_back(lbdt::check(name, t, x, dtype, shape));
  };
  const auto reads_any = [&](const char* name, const Tensor& t, int64_t size) {
    read.push_back(lbdt::check(name, t, x, t.scalar_type(), {size}, false));
  };
  reads_any("timesteps", timesteps, batch);
  reads("latents", latents, ScalarType::Long, {watched});
  reads("thresholds", thresholds, ScalarType::Float, {bins, watched});
  reads("times", times, ScalarType::Float, {bins});
  reads("enabled", enabled, ScalarType::Bool, {sets, watched});
  reads("seeds", seeds, ScalarType::Long, {seeds.numel()});
  STD_TORCH_CHECK(bins > 0, "times: expected T >= 1");
  for (const auto& [name, size] : {std::pair{"enabled", sets}, std::pair{"seeds", seeds.numel()}})
    STD_TORCH_CHECK(
        size > 0 && images % size == 0, name, ": expected 1, or a divisor of the ", images, " images, got ", size);
  lbdt::check_within("latents", latents, weight.size(0));
  if (minus) {
    const auto shape = x.sizes();
    const bool same = minus->dim() == x.dim() && std::equal(shape.begin(), shape.end(), minus->sizes().begin());
    STD_TORCH_CHECK(same && minus->scalar_type() == x.scalar_type(), "minus: expected the sizes and dtype of x");
    read.push_back(lbdt::check_memory("minus", *minus, x));
  }
  int64_t spare = 0, known = 0;
  if (bank) {
    spare = bank->dim() == 3 ? bank->size(1) : 0;
    reads("bank", *bank, x.scalar_type(), {bins, spare, x.size(1)});
    STD_TORCH_CHECK(0 < spare && spare < lbdt::kMostChannels, "bank: expected 1 <= M < 2^31, got ", spare);
  }
  STD_TORCH_CHECK(
      known_latents.has_value() == known_thresholds.has_value(), "known_latents: expected with known_thresholds");
  if (known_latents) {
    known = known_latents->dim() == 1 ? known_latents->size(0) : 0;
    reads("known_latents", *known_latents, ScalarType::Long, {known});
    reads("known_thresholds", *known_thresholds, ScalarType::Float, {bins, known});
    lbdt::check_within("known_latents", *known_latents, weight.size(0));
  }
  std::optional<Gate> gate;
  if (least) {
    STD_TORCH_CHECK(owners.has_value(), "owners: expected a tensor, as least is one");
    gate = Gate(x, watched, bins, *owners, *least, least_of, std::nullopt, std::nullopt, std::nullopt);
    read.push_back(std::get<0>(gate->spans));
    read.push_back(std::get<1>(gate->spans));
  }
  if (schedule) {
    const int64_t size = schedule->dim() == 1 ? schedule->size(0) : 0;
    reads_any("schedule", *schedule, size);
    STD_TORCH_CHECK(size > 0, "schedule: expected a timestep or more");
  }

  const std::optional<lbdt::Screen> screen = lbdt::read_screen(codes, bounds, centre, x, weight.size(0));
  if (screen) read.insert(read.end(), screen->spans.begin(), screen->spans.end());
  if (order) reads("order", *order, ScalarType::Long, {weight.size(0)});
  const int64_t* ordered = order ? data<int64_t>(*order) : nullptr;

  std::vector<Span> writes;
  const auto apart = [&](const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
    const Span own = lbdt::check(name, t, x, dtype, shape);
    for (const auto* others : {&read, &writes})
      for (const Span& other : *others) lbdt::check_apart(name, own, {other});
    writes.push_back(own);
  };
  const int64_t row_count = rows.dim() == 2 ? rows.size(0) : 0, cell_count = cells.dim() == 1 ? cells.size(0) : 0;
  const int64_t fields = lbdt::kFields + 1 + gate.has_value();
  apart("rows", rows, ScalarType::Long, {row_count, fields});
  STD_TORCH_CHECK(row_count > 0, "rows: expected one or more");
  apart("cells", cells, ScalarType::Byte, {cell_count});
  apart("written", written, ScalarType::Long, {2});
  std::optional<RunMemory> run;
  STD_TORCH_CHECK(
      run_sums.has_value() == run_last.has_value() && run_sums.has_value() == run_count.has_value() &&
          (!run_sums || gate),
      "run_sums: expected with run_last, run_count and least");
  if (run_sums) {
    const int64_t room = run_last->dim() == 1 ? run_last->size(0) : 0, counting = cond < 0 ? batch : images;
    apart("run_sums", *run_sums, ScalarType::Long, {room, gate->concepts + 1});
    apart("run_last", *run_last, ScalarType::Float, {room});
    apart("run_count", *run_count, ScalarType::Long, {});
    STD_TORCH_CHECK(counting <= room, "run_sums: expected room for ", counting, " images, got ", room);
    run = RunMemory{
        written_data<int64_t>(*run_sums), written_data<float>(*run_last), written_data<int64_t>(*run_count),
        std::max<int64_t>(counting, 1), gate->concepts, whole_calls};
  }

  const CallRows call = lbdt::call_rows(
      {timesteps, times, enabled, seeds, schedule, images, first, last, cond, counted});
  std::vector<int64_t> not_finite(batch), gated(batch), so_far;
  if (gate) {
    gate->deciding = cond < 0 ? nullptr : call.deciding.data();
    gate->gated = gated.data();
    if (run) so_far = run->begin(call);
    gate->so_far = run ? so_far.data() : nullptr;
  }
  // One after the other: the mask, what is replaced, and the patches that are no donors.
  const std::unique_ptr<bool[]> masks(new bool[3 * batch * count]());
  bool *mask = masks.get(), *replaced = mask + batch * count, *avoid = replaced + batch * count;
  const auto bytes = [](const bool* from) { return reinterpret_cast<const uint8_t*>(from); };
  std::optional<Tensor> out;
  if (batch * count > 0) {
    lbdt::detect(
        x, minus,
        {weight, ordered, data<float>(bias), data<int64_t>(latents), data<float>(thresholds), call.bins.data(),
         call.enabled.data(), watched, k, mask, gate, screen, not_finite.data()});
    const bool any = std::any_of(mask, replaced, [](bool set) { return set; });
    if (any && known_latents) {
      std::vector<uint8_t> on(batch * known);
      for (int64_t b = 0; b < batch; ++b) {
        const bool* own = mask + b * count;
        std::fill_n(on.begin() + b * known, known, std::any_of(own, own + count, [](bool set) { return set; }));
      }
      lbdt::detect(
          x, minus,
          {weight, ordered, data<float>(bias), data<int64_t>(*known_latents), data<float>(*known_thresholds),
           call.bins.data(), on.data(), known, k, avoid, std::nullopt, screen});
    }
    const auto output = [&](int64_t patches) {
      if (patches > 0) out = torch::stable::empty_like(x);
      return out;
    };
    const lbdt::Grid grid{static_cast<int>(height), static_cast<int>(width)};
    const lbdt::Numbers numbers{nullptr, call.seeds.data(), call.words.data(), call.halves.data()};
    if (any)
      lbdt::replace(
          {x, grid, bytes(mask), numbers, bank ? bank->const_data_ptr() : nullptr, spare, call.bins.data(),
           known_latents ? bytes(avoid) : nullptr, padding, static_cast<int>(source), replaced},
          false, output);
  } else if (gate) {
    gate->close(mask, nullptr, call.bins.data(), batch, count);
  }
  if (run && batch > 0) run->keep(call, so_far);
  lbdt::record(
      {written_data<int64_t>(rows), row_count, fields, written_data<uint8_t>(cells), cell_count,
       written_data<int64_t>(written)},
      {batch, count, bytes(mask), bytes(replaced), call.times.data(), 1, sizes, not_finite.data(),
       gate ? gated.data() : nullptr, 1});
  if (out) return *out;
  std::vector<int64_t> none(x.sizes().begin(), x.sizes().end());
  none[0] = 0;
  return torch::stable::empty(none, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("erase_step_cpp", TORCH_BOX(&erase_step_cpp));
}
