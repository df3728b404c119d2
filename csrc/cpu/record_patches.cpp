// record_patches on CPU tensors. Schema, checks and fake: lbdt/ops/_schema.py and lbdt/ops/record_patches.py.
//
// Eq.: lbdt/reference/record_patches.py. Reads 2 bytes a patch (6 with sums), writes 32 bytes a row (40) and a byte a
// kept cell.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

namespace {

using torch::stable::Tensor;

constexpr int64_t kFields = 4;

// What `written` holds may be anything that fits an int64; a ring's places may not.
int64_t remainder(int64_t value, int64_t size) { return (value % size + size) % size; }

void record_patches_cpp(
    const Tensor mask,       // [B, N] bool, contiguous
    const Tensor replaced,   // [B, N] bool, contiguous
    const Tensor timesteps,  // [B] float32, any stride
    int64_t sizes,
    Tensor rows,     // [R, 4] int64, contiguous; [R, 5] with sums
    Tensor cells,    // [C] uint8, contiguous; C = 0: not kept
    Tensor written,  // [2] int64, contiguous
    const std::optional<Tensor> sums) {  // [B, N] float32, contiguous
  const int64_t batch = mask.size(0), patches = mask.size(1), row_count = rows.size(0), cell_count = cells.size(0);
  const int64_t fields = kFields + sums.has_value();
  STD_TORCH_CHECK(rows.size(1) == fields && row_count > 0, "rows: expected [R >= 1, 4], or 5 columns with sums");
  const uint8_t* before = static_cast<const uint8_t*>(mask.const_data_ptr());
  const uint8_t* after = static_cast<const uint8_t*>(replaced.const_data_ptr());
  const float* totals = sums ? static_cast<const float*>(sums->const_data_ptr()) : nullptr;
  const float* times = static_cast<const float*>(timesteps.const_data_ptr());
  int64_t* to = static_cast<int64_t*>(rows.mutable_data_ptr());
  int64_t* counters = static_cast<int64_t*>(written.mutable_data_ptr());

  for (int64_t image = 0; image < batch; ++image) {
    const uint8_t *m = before + image * patches, *r = after + image * patches;
    int64_t detected = 0, overwritten = 0;
    for (int64_t p = 0; p < patches; ++p) {
      detected += m[p];
      overwritten += r[p];
    }
    int32_t bits;
    std::memcpy(&bits, times + image * timesteps.stride(0), sizeof(bits));
    int64_t* row = to + remainder(counters[0] + image, row_count) * fields;
    row[0] = detected;
    row[1] = overwritten;
    row[2] = bits;
    row[3] = sizes;
    if (totals == nullptr) continue;
    row[4] = 0;
    for (int64_t p = 0; p < patches; ++p) row[4] += !std::isfinite(totals[image * patches + p]);
  }
  counters[0] += batch;
  if (cell_count == 0) return;
  uint8_t* kept = static_cast<uint8_t*>(cells.mutable_data_ptr());
  int64_t place = remainder(counters[1], cell_count);
  for (int64_t i = 0; i < batch * patches; ++i) {
    kept[place] = static_cast<uint8_t>(before[i] + 2 * after[i]);
    if (++place == cell_count) place = 0;
  }
  counters[1] += batch * patches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("record_patches_cpp", TORCH_BOX(&record_patches_cpp));
}
