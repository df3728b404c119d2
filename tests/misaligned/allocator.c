/* For LD_PRELOAD: what torch allocates for a CPU tensor (posix_memalign to 64 bytes) lies 0, 16, 32 or 48 bytes past a
 * multiple of 64, another one from call to call. Everything else is allocated as always. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *pointer);

enum { TORCH = 64, STEP = 16, HEAD = 64 };
/* Before a shifted block; malloc keeps the size of a block in the same place, and none is as large. */
static const uint64_t SHIFTED = 0x9e3779b97f4a7c15u;
static atomic_uint calls;

int posix_memalign(void **out, size_t alignment, size_t size) {
  if (alignment < sizeof(void *) || (alignment & (alignment - 1))) return EINVAL;
  if (size > SIZE_MAX / 2) return ENOMEM;
  size_t extra = alignment == TORCH ? HEAD + 3 * STEP : 0;
  char *base = __libc_memalign(alignment, size + extra);
  if (!base) return ENOMEM;
  *out = base;
  if (alignment == TORCH) {
    uint32_t mixed = atomic_fetch_add(&calls, 1u) * 2654435761u; /* the two highest bits take turns irregularly */
    uint64_t *block = (uint64_t *)(base + HEAD + STEP * (mixed >> 30));
    block[-1] = SHIFTED;
    block[-2] = (uint64_t)base;
    *out = block;
  }
  return 0;
}

void free(void *pointer) {
  uint64_t *block = pointer;
  if (block && block[-1] == SHIFTED) {
    block[-1] = 0;
    pointer = (void *)block[-2];
  }
  __libc_free(pointer);
}
