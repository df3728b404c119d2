// What record_patches.cpp computes, for other ops that have checked their arguments.

#pragma once

#include <cstdint>

namespace lbdt {

constexpr int64_t kFields = 4;  // of a row, and one more with not_finite and with gated

struct Rings {
  int64_t* rows;  // [R, fields]
  int64_t row_count, fields;
  uint8_t* cells;  // [C]
  int64_t cell_count;
  int64_t* written;  // [2]
};

struct Record {
  int64_t batch, patches;
  const uint8_t* before;      // [B, N], as after: the mask before and after padding
  const uint8_t* after;
  const float* times;         // [B]
  int64_t time_step, sizes;
  const int64_t* not_finite;  // [B]; null: no such field
  const int64_t* gated;       // [B]; null: no such field
  int64_t gated_step;
};

void record(const Rings& rings, const Record& call);

}  // namespace lbdt
