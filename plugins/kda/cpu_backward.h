/* What the instruction-set-neutral half of the CPU backward pass (cpu_backward.cpp) hands to its kernels
 * (cpu_backward_kernel.cpp, which is compiled once per instruction set).  Plain data only, for the reason in
 * cpu_kernel.h. */
#ifndef LITEDETR_KDA_CPU_BACKWARD_H
#define LITEDETR_KDA_CPU_BACKWARD_H

#include "kda.h"

namespace kda {
namespace backward {

constexpr int kMaxSamples = KDA_MAX_LEVELS * KDA_MAX_POINTS;

/* A level in a head's map, with a border as in cpu_kernel.h: rows -2, -1 and H and column -1 are there, and a sample
 * outside the map has its four corners in rows -2 and -1.  In the maps of gradients the border takes what is lost. */
struct Level {
  int32_t height;
  int32_t width;
  int32_t pitch;       /* tokens from one row to the next: W + 1 */
  int32_t origin;      /* token of pixel (0, 0) in the map */
  int64_t first_token; /* of the level, in `value` */
};

struct Plan {
  const kda_arguments* arguments;
  const kda_gradients* gradients;
  Level levels[KDA_MAX_LEVELS];
  int64_t tokens; /* in a head's map */
  int64_t stride; /* floats a token takes in a map: D rounded up to whole vectors */
};

/* One thread's memory, 64-byte aligned. */
struct Scratch {
  float *value, *value_gradient; /* maps, [tokens, stride] */
  float *key, *key_gradient;     /* the same two where there is no own key */
  float* value_samples;          /* [L*P, 3, stride]: the sample and its slopes along x and along y */
  float* key_samples;
  float *query, *output_gradient, *query_gradient; /* [stride] */
};

struct Kernel {
  const char* isa;
  int lanes; /* floats in a vector */
  /* Every gradient of one head of a batch item, except that sampling_offsets receives the gradient of the pixel
   * coordinates and reference_points is left alone. */
  void (*differentiate)(const Plan* plan, int64_t item, int64_t head, const Scratch* scratch);
};

extern const Kernel kGenericKernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;

}  // namespace backward
}  // namespace kda

#endif /* LITEDETR_KDA_CPU_BACKWARD_H */
