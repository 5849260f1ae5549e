/* The CPU backward pass: checks, choice of the kernel, division of the work.  The arithmetic is in
 * cpu_backward_kernel.cpp.  A task is a head of a batch item, the only writer of its part of every gradient: no
 * atomics, and the same bits on any number of threads. */
#include "cpu_backward.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "check.h"

namespace kda {
namespace backward {
namespace {

/* The instruction set of the forward pass. */
const Kernel* kernel() {
#if defined(KDA_X86)
  if (strcmp(kda_cpu_isa(), kAvx512Kernel.isa) == 0) return &kAvx512Kernel;
  if (strcmp(kda_cpu_isa(), kAvx2Kernel.isa) == 0) return &kAvx2Kernel;
#endif
  return &kGenericKernel;
}

struct Work {
  Plan plan;
  const Kernel* kernel;
  std::atomic<bool> out_of_memory;
};

void make_plan(const kda_arguments* a, const kda_gradients* gradients, const Kernel* kernel, Plan* plan) {
  plan->arguments = a;
  plan->gradients = gradients;
  plan->stride = (a->head_dim + kernel->lanes - 1) / kernel->lanes * kernel->lanes;
  plan->tokens = 0;
  int64_t token = 0;
  for (int l = 0; l < a->num_levels; ++l) {
    Level& level = plan->levels[l];
    level.height = static_cast<int32_t>(read_side(a, 2 * l));
    level.width = static_cast<int32_t>(read_side(a, 2 * l + 1));
    level.pitch = level.width + 1;
    level.origin = static_cast<int32_t>(plan->tokens + 2 * level.pitch + 1);
    level.first_token = token;
    token += int64_t{level.height} * level.width;
    plan->tokens += int64_t{level.height + 3} * level.pitch;
  }
  plan->tokens += 1; /* column W of the last level's row H */
}

/* Lays the scratch memory out from `memory` on; returns its size in floats. */
int64_t lay_out(const Plan* plan, float* memory, Scratch* scratch) {
  const kda_arguments* a = plan->arguments;
  const int64_t map = (plan->tokens * plan->stride + 15) / 16 * 16;
  const int64_t samples = (a->num_levels * a->num_points * 3 * plan->stride + 15) / 16 * 16;
  const int64_t token = (plan->stride + 15) / 16 * 16;
  int64_t size = 0;
  const auto take = [&](int64_t floats) {
    size += floats;
    return memory ? memory + size - floats : nullptr;
  };
  const bool own_key = a->key_aware && a->key;
  scratch->value = take(map);
  scratch->value_gradient = take(map);
  scratch->key = own_key ? take(map) : scratch->value;
  scratch->key_gradient = own_key ? take(map) : scratch->value_gradient;
  scratch->value_samples = take(samples);
  scratch->key_samples = own_key ? take(samples) : scratch->value_samples;
  scratch->query = take(token);
  scratch->output_gradient = take(token);
  scratch->query_gradient = take(token);
  return size;
}

void differentiate_task(int64_t begin, int64_t end, void* state) {
  Work* work = static_cast<Work*>(state);
  const Plan* plan = &work->plan;
  Scratch scratch;
  const size_t bytes = static_cast<size_t>(lay_out(plan, nullptr, &scratch)) * sizeof(float);
  float* memory = static_cast<float*>(aligned_alloc(64, bytes));
  if (!memory) {
    work->out_of_memory = true;
    return;
  }
  lay_out(plan, memory, &scratch);
  const int64_t heads = plan->arguments->num_heads;
  for (int64_t task = begin; task < end; ++task) {
    work->kernel->differentiate(plan, task / heads, task % heads, &scratch);
  }
  free(memory);
}

/* From the gradient of the pixel coordinates, which sampling_offsets' gradient holds so far, to the gradients of the
 * offsets and of the reference points; rows are queries of the whole batch.
 *
 *   width 2: pixel = x W + offset - 0.5          width 4: pixel = x W + offset w W / (2 P) - 0.5 */
void refer_task(int64_t begin, int64_t end, void* state) {
  const Plan* plan = &static_cast<Work*>(state)->plan;
  const kda_arguments* a = plan->arguments;
  const int num_samples = a->num_levels * a->num_points, width = a->reference_width;
  const float* offsets = static_cast<const float*>(a->sampling_offsets);
  for (int64_t row = begin; row < end; ++row) {
    for (int l = 0; l < a->num_levels; ++l) {
      const float sides[2] = {static_cast<float>(plan->levels[l].width), static_cast<float>(plan->levels[l].height)};
      const int64_t box = (row * a->num_levels + l) * width;
      for (int axis = 0; axis < 2; ++axis) {
        const float side = sides[axis], unit = side * 0.5f / static_cast<float>(a->num_points);
        const float extent = width == 4 ? a->reference_points[box + 2 + axis] : 0;
        float centre_sum = 0, extent_sum = 0;
        for (int64_t head = 0; head < a->num_heads; ++head) {
          const int64_t first = ((row * a->num_heads + head) * num_samples + l * a->num_points) * 2 + axis;
          for (int64_t i = first; i < first + 2 * a->num_points; i += 2) {
            float* gradient = plan->gradients->sampling_offsets + i;
            centre_sum += *gradient;
            if (width == 2) continue;
            extent_sum += *gradient * offsets[i];
            *gradient *= extent * unit;
          }
        }
        if (!plan->gradients->reference_points) continue;
        plan->gradients->reference_points[box + axis] = centre_sum * side;
        if (width == 4) plan->gradients->reference_points[box + 2 + axis] = extent_sum * unit;
      }
    }
  }
}

void run(const kda_executor* executor, int64_t count, kda_task task, Work* work) {
  if (executor) {
    executor->run(executor->self, count, task, work);
  } else {
    task(0, count, work);
  }
}

}  // namespace
}  // namespace backward
}  // namespace kda

using namespace kda::backward;

extern "C" kda_status kda_cpu_backward(const kda_arguments* arguments, const kda_gradients* gradients,
                                       const kda_executor* executor, char* message, size_t message_size) {
  kda_arguments a = *arguments;
  a.output = const_cast<float*>(gradients->output); /* what the check wants of an output, this pass has here */
  const kda_status status = kda_cpu_check(&a, message, message_size);
  if (status != KDA_OK) return status;
  if (a.dtype != KDA_FLOAT32) {
    kda::print(message, message_size, "value has dtype %d; the CPU backward pass takes 0 (float32)", a.dtype);
    return KDA_UNSUPPORTED;
  }
  if (a.batch == 0) return KDA_OK;
  const bool own_key = a.key_aware && a.key;
  if (!gradients->value || (own_key && !gradients->key) ||
      (a.num_queries && (!gradients->query || !gradients->sampling_offsets))) {
    kda::print(message, message_size,
               "a gradient is NULL; all but that of reference_points must point to the tensor's data");
    return KDA_INVALID_ARGUMENT;
  }
  if (a.num_queries == 0) {
    const size_t bytes = static_cast<size_t>(a.batch * a.num_tokens * a.num_heads * a.head_dim) * sizeof(float);
    memset(gradients->value, 0, bytes);
    if (own_key) memset(gradients->key, 0, bytes);
    return KDA_OK;
  }
  Work work = {};
  work.kernel = kernel();
  make_plan(&a, gradients, work.kernel, &work.plan);
  run(executor, a.batch * a.num_heads, differentiate_task, &work);
  if (work.out_of_memory) {
    kda::print(message, message_size, "there is no memory for the maps of a head, %lld tokens of %lld floats",
               (long long)work.plan.tokens, (long long)work.plan.stride);
    return KDA_UNSUPPORTED;
  }
  if (a.reference_width == 4 || gradients->reference_points) {
    run(executor, a.batch * a.num_queries, refer_task, &work);
  }
  return KDA_OK;
}
