// record_patches on CPU tensors. Schema, checks and fake: lbdt/ops/record_patches.py.
//
// Eq.: lbdt/reference/record_patches.py. Reads 2 bytes a patch (6 with sums), writes 32 bytes a row (8 more with
// sums and with gated) and a byte a kept cell.

#include "checks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

namespace {

using lbdt::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFields = 4;

// What `written` holds may be anything that fits an int64; a ring's places may not.
int64_t remainder(int64_t value, int64_t size) {
  const int64_t rest = value % size;
  return rest < 0 ? rest + size : rest;
}

// As torch adds them: around the end.
int64_t add(int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }

void record_patches_cpp(
    const Tensor mask,       // [B, N] bool, contiguous
    const Tensor replaced,   // [B, N] bool, contiguous
    const Tensor timesteps,  // [B] float32, any stride
    int64_t sizes,
    Tensor rows,     // [R, 4] int64, contiguous; one more with sums and with gated
    Tensor cells,    // [C] uint8, contiguous; C = 0: not kept
    Tensor written,  // [2] int64, contiguous
    const std::optional<Tensor> sums,     // [B, N] float32, contiguous
    const std::optional<Tensor> gated) {  // [B] int64, any stride
  const int64_t batch = mask.dim() == 2 ? mask.size(0) : 0, patches = mask.dim() == 2 ? mask.size(1) : 0;
  const int64_t row_count = rows.dim() == 2 ? rows.size(0) : 0, cell_count = cells.dim() == 1 ? cells.size(0) : 0;
  const int64_t fields = kFields + sums.has_value() + gated.has_value();
  const Span before_padding = lbdt::check("mask", mask, mask, ScalarType::Bool, {batch, patches});
  const Span after_padding = lbdt::check("replaced", replaced, mask, ScalarType::Bool, {batch, patches});
  const Span time = lbdt::check("timesteps", timesteps, mask, ScalarType::Float, {batch}, false);
  const Span row_ring = lbdt::check("rows", rows, mask, ScalarType::Long, {row_count, fields});
  STD_TORCH_CHECK(row_count > 0, "rows: expected R >= 1");
  const Span cell_ring = lbdt::check("cells", cells, mask, ScalarType::Byte, {cell_count});
  const Span ends = lbdt::check("written", written, mask, ScalarType::Long, {2});
  const Span sum = sums ? lbdt::check("sums", *sums, mask, ScalarType::Float, {batch, patches}) : Span();
  const Span taken = gated ? lbdt::check("gated", *gated, mask, ScalarType::Long, {batch}, false) : Span();
  lbdt::check_apart("rows", row_ring, {before_padding, after_padding, time, sum, taken, cell_ring, ends});
  lbdt::check_apart("cells", cell_ring, {before_padding, after_padding, time, sum, taken, ends});
  lbdt::check_apart("written", ends, {before_padding, after_padding, time, sum, taken});
  const uint8_t* before = static_cast<const uint8_t*>(mask.const_data_ptr());
  const uint8_t* after = static_cast<const uint8_t*>(replaced.const_data_ptr());
  const float* totals = sums ? static_cast<const float*>(sums->const_data_ptr()) : nullptr;
  const int64_t* gates = gated ? static_cast<const int64_t*>(gated->const_data_ptr()) : nullptr;
  const float* times = static_cast<const float*>(timesteps.const_data_ptr());
  int64_t* to = static_cast<int64_t*>(rows.mutable_data_ptr());
  int64_t* counters = static_cast<int64_t*>(written.mutable_data_ptr());

  const int64_t first = remainder(counters[0], row_count);
  for (int64_t image = 0; image < batch; ++image) {
    const uint8_t *m = before + image * patches, *r = after + image * patches;
    int64_t detected = 0, overwritten = 0;
    for (int64_t p = 0; p < patches; ++p) {
      detected += m[p] != 0;
      overwritten += r[p] != 0;
    }
    int32_t bits;
    std::memcpy(&bits, times + image * timesteps.stride(0), sizeof(bits));
    int64_t* row = to + (first + image) % row_count * fields;
    row[0] = detected;
    row[1] = overwritten;
    row[2] = bits;
    row[3] = sizes;
    if (gates != nullptr) row[fields - 1] = gates[image * gated->stride(0)];
    if (totals == nullptr) continue;
    row[kFields] = 0;
    for (int64_t p = 0; p < patches; ++p) row[kFields] += !std::isfinite(totals[image * patches + p]);
  }
  counters[0] = add(counters[0], batch);
  if (cell_count == 0) return;
  uint8_t* kept = static_cast<uint8_t*>(cells.mutable_data_ptr());
  int64_t place = remainder(counters[1], cell_count);
  for (int64_t i = 0; i < batch * patches; ++i) {
    kept[place] = static_cast<uint8_t>((before[i] != 0) + 2 * (after[i] != 0));
    if (++place == cell_count) place = 0;
  }
  counters[1] = add(counters[1], batch * patches);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("record_patches_cpp", TORCH_BOX(&record_patches_cpp));
}
