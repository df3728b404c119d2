// The products and bounds of one instruction set: which, is chosen when the program runs.

#pragma once

#include "screen_amx.h"
#include "screen_tiles.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace lbdt {

struct ScreenKernels {
  const char* name;
  ScreenBlock block[2];  // for panels of 16 and of 32 lanes
};

// Null where the processor has no such product. Throws where it has one that is wrong.
inline const ScreenKernels* choose_screen_kernels() {
#if defined(__x86_64__)
  static const ScreenKernels vnni{"avx512_vnni", {screen_vnni<1>, screen_vnni<2>}};
  const bool has_vnni =
      kernels().lanes == 16 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#if defined(LBDT_AMX)
  static const ScreenKernels amx{"amx_int8", {screen_amx<1>, screen_amx<2>}};
  // The variable holds torch to AVX-512 or less, and so to none of this.
  if (has_vnni && std::getenv("ATEN_CPU_CAPABILITY") == nullptr && amx::usable()) {
    // An error, though VNNI would do: torch's own products of bfloat16 and int8 are of these tiles too, and what erases
    // a concept should not run for long on a machine that is known to miscalculate.
    STD_TORCH_CHECK(
        amx_multiplies_right(),
        "int8 screen: expected AMX tiles to multiply 8-bit integers exactly, as this processor says that it does, got "
        "other sums: a fault of the machine or of its hypervisor. Use another machine, or do without AMX: set "
        "ATEN_CPU_CAPABILITY=avx512 for lbdt, and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 for torch");
    return &amx;
  }
#endif
  if (has_vnni) return &vnni;
#if defined(LBDT_AVXVNNI)
  static const ScreenKernels narrow{"avx_vnni", {screen_avxvnni_block<1>, screen_avxvnni_block<2>}};
  if (kernels().lanes >= 8 && has_avxvnni()) return &narrow;
#endif
#endif
  return nullptr;
}

// The same, chosen once, as the tiles of float32 are, with which the processor must agree.
inline const ScreenKernels* screen_kernels() {
  static const ScreenKernels* chosen = choose_screen_kernels();
  return chosen;
}

// Compares `count` latents from `first` on with the patches; `bits` [count].
inline void screen_block(
    const int8_t* codes,
    int64_t code_step,
    int64_t count,
    const uint32_t* words,
    int64_t word_count,
    int64_t lanes,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  screen_kernels()->block[lanes / kScreenHalf - 1](
      codes, code_step, count, words, word_count, latents, patches, first, counts, bits);
}

}  // namespace lbdt
