// record_patches on CPU tensors. Schema, checks and fake: lbdt/ops/record_patches.py.
//
// Eq.: lbdt/reference/record_patches.py. Reads 2 bytes a patch (6 with sums), writes 32 bytes a row (8 more with
// sums and with gated) and a byte a kept cell.

#include "checks.h"
#include "recording.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using lbdt::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What `written` holds may be anything that fits an int64; a ring's places may not.
int64_t remainder(int64_t value, int64_t size) {
  const int64_t rest = value % size;
  return rest < 0 ? rest + size : rest;
}

// As torch adds them: around the end.
int64_t add(int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }

}  // namespace

void lbdt::record(const Rings& rings, const Record& call) {
  const int64_t first = remainder(rings.written[0], rings.row_count);
  for (int64_t image = 0; image < call.batch; ++image) {
    const uint8_t *m = call.before + image * call.patches, *r = call.after + image * call.patches;
    int64_t detected = 0, overwritten = 0;
    for (int64_t p = 0; p < call.patches; ++p) {
      detected += m[p] != 0;
      overwritten += r[p] != 0;
    }
    int32_t bits;
    std::memcpy(&bits, call.times + image * call.time_step, sizeof(bits));
    int64_t* row = rings.rows + (first + image) % rings.row_count * rings.fields;
    row[0] = detected;
    row[1] = overwritten;
    row[2] = bits;
    row[3] = call.sizes;
    if (call.not_finite != nullptr) row[kFields] = call.not_finite[image];
    if (call.gated != nullptr) row[rings.fields - 1] = call.gated[image * call.gated_step];
  }
  rings.written[0] = add(rings.written[0], call.batch);
  if (rings.cell_count == 0) return;
  int64_t place = remainder(rings.written[1], rings.cell_count);
  for (int64_t i = 0; i < call.batch * call.patches; ++i) {
    rings.cells[place] = static_cast<uint8_t>((call.before[i] != 0) + 2 * (call.after[i] != 0));
    if (++place == rings.cell_count) place = 0;
  }
  rings.written[1] = add(rings.written[1], call.batch * call.patches);
}

namespace {

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
  const int64_t fields = lbdt::kFields + sums.has_value() + gated.has_value();
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
  std::vector<int64_t> not_finite(sums ? batch : 0);
  const float* totals = sums ? static_cast<const float*>(sums->const_data_ptr()) : nullptr;
  for (size_t i = 0; i < not_finite.size(); ++i, totals += patches)
    not_finite[i] = std::count_if(totals, totals + patches, [](float total) { return !std::isfinite(total); });
  const lbdt::Rings rings{
      static_cast<int64_t*>(rows.mutable_data_ptr()),
      row_count,
      fields,
      static_cast<uint8_t*>(cells.mutable_data_ptr()),
      cell_count,
      static_cast<int64_t*>(written.mutable_data_ptr())};
  lbdt::record(
      rings,
      {batch,
       patches,
       static_cast<const uint8_t*>(mask.const_data_ptr()),
       static_cast<const uint8_t*>(replaced.const_data_ptr()),
       static_cast<const float*>(timesteps.const_data_ptr()),
       timesteps.stride(0),
       sizes,
       sums ? not_finite.data() : nullptr,
       gated ? static_cast<const int64_t*>(gated->const_data_ptr()) : nullptr,
       gated ? gated->stride(0) : 0});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("record_patches_cpp", TORCH_BOX(&record_patches_cpp));
}
