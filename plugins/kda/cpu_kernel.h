/* What the instruction-set-neutral half of the CPU operator (cpu.cpp) hands to the kernels (cpu_kernel.cpp, which is
 * compiled once per instruction set).  Plain data only: an inline function or a std:: template here could be compiled
 * with AVX-512 and then be the copy that the linker keeps for everybody. */
#ifndef LITEDETR_KDA_CPU_KERNEL_H
#define LITEDETR_KDA_CPU_KERNEL_H

#include "kda.h"

namespace kda {

constexpr int kMaxSamples = KDA_MAX_LEVELS * KDA_MAX_POINTS;

/* A level in the workspace, where every head has a map of its own with a border of zeros, so that a corner outside the
 * map is an ordinary load:
 *
 *     row -2   zeros             a sample outside the map reads its four corners in rows -2 and -1
 *     row -1   zeros
 *     row  y   0 v v v ... v     column -1, then the W tokens; the next row's column -1 serves as column W
 *     row  H   zeros
 */
struct Level {
  int32_t height;
  int32_t width;
  int32_t pitch;       /* tokens from one workspace row to the next: W + 1 */
  int32_t origin;      /* workspace index of pixel (0, 0) */
  int64_t first_token; /* of the level, in `value` */
  int64_t first_row;   /* of the level, in the count of all workspace rows */
};

/* One batch item, shared by all its tasks. */
struct Plan {
  const kda_arguments* arguments;
  int64_t item;
  Level levels[KDA_MAX_LEVELS];
  int64_t rows;        /* workspace rows of a head, over all levels: H + 3 each */
  int64_t tokens;      /* workspace tokens of a head */
  int64_t stride;      /* floats a token takes in the workspace: D rounded up to whole vectors */
  int64_t query_chunk; /* queries a task takes */
  int64_t num_chunks;  /* tasks a head takes, or all heads in place */
  bool in_place;       /* the value is read as it came, without a workspace */
  int64_t* order;      /* [queries], the order in which they are taken, but in place */
  float* key;          /* [heads, tokens, stride]; the same as `value` when there is no key */
  float* value;
};

struct Kernel {
  const char* isa;
  int lanes; /* floats in a vector */
  /* Workspace rows [begin, end) of all heads. */
  void (*repack)(const Plan* plan, int64_t begin, int64_t end);
  /* Tasks [begin, end); each is one chunk of queries, of one head or, in place, of all.  The heads of a chunk follow
   * one another. */
  void (*attend)(const Plan* plan, int64_t begin, int64_t end);
};

extern const Kernel kGenericKernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;

/* Makes `kda_cpu_forward` use the named instruction set: for tests and timing.  False where the machine or the build
 * lacks it. */
bool select_isa(const char* isa);

}  // namespace kda

#endif /* LITEDETR_KDA_CPU_KERNEL_H */
