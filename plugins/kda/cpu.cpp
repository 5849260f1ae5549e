/* The CPU operator: checks, choice of the kernel, division of the work.  The arithmetic is in cpu_kernel.cpp. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "cpu_kernel.h"

namespace kda {
namespace {

/* Pixel coordinates are FP32 and their floors int32: a side of 2^22 keeps a quarter pixel, and a map's tokens fit. */
constexpr int64_t kMaxSide = int64_t{1} << 22;
constexpr int64_t kMaxTokens = int64_t{1} << 30;

/* Queries of one head that a task takes: some 20 microseconds, so that both a dynamic scheduler's overhead and a static
 * one's imbalance stay small. */
constexpr int64_t kQueryChunk = 128;

const Kernel *best_kernel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return &kAvx512Kernel;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kAvx2Kernel;
  }
#endif
  return &kGenericKernel;
}

std::atomic<const Kernel *> selected{nullptr};

const Kernel *kernel() {
  const Kernel *chosen = selected.load(std::memory_order_relaxed);
  if (!chosen) {
    chosen = best_kernel();
    selected.store(chosen, std::memory_order_relaxed);
  }
  return chosen;
}

__attribute__((format(printf, 3, 4))) void print(char *message, size_t size, const char *format, ...) {
  if (!message || size == 0) return;
  va_list values;
  va_start(values, format);
  vsnprintf(message, size, format, values);
  va_end(values);
}

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case KDA_FLOAT32: return "float32";
    case KDA_FLOAT16: return "float16";
    case KDA_BFLOAT16: return "bfloat16";
    default: return "unknown";
  }
}

Plan make_plan(const kda_arguments *a) {
  Plan plan = {};
  plan.arguments = a;
  const int lanes = kernel()->lanes;
  plan.stride = (a->head_dim + lanes - 1) / lanes * lanes;
  int64_t token = 0;
  for (int l = 0; l < a->num_levels; ++l) {
    Level &level = plan.levels[l];
    level.height = static_cast<int32_t>(a->spatial_shapes[2 * l]);
    level.width = static_cast<int32_t>(a->spatial_shapes[2 * l + 1]);
    level.pitch = level.width + 1;
    level.first_token = token;
    level.first_row = plan.rows;
    level.origin = static_cast<int32_t>(plan.tokens + 2 * level.pitch + 1);
    token += int64_t{level.height} * level.width;
    plan.rows += level.height + 3;
    plan.tokens += int64_t{level.height + 3} * level.pitch;
  }
  plan.tokens += 1; /* column W of the last level's row H */
  plan.num_chunks = (a->num_queries + kQueryChunk - 1) / kQueryChunk;
  plan.query_chunk = plan.num_chunks ? (a->num_queries + plan.num_chunks - 1) / plan.num_chunks : 0;
  return plan;
}

bool has_own_key(const kda_arguments *a) { return a->key_aware && a->key; }

void repack_task(int64_t begin, int64_t end, void *state) {
  kernel()->repack(static_cast<const Plan *>(state), begin, end);
}

void attend_task(int64_t begin, int64_t end, void *state) {
  kernel()->attend(static_cast<const Plan *>(state), begin, end);
}

void run(const kda_executor *executor, int64_t count, kda_task task, Plan *plan) {
  if (executor) {
    executor->run(executor->self, count, task, plan);
  } else {
    task(0, count, plan);
  }
}

}  // namespace

bool select_isa(const char *isa) {
#if defined(__x86_64__)
  const Kernel *const kernels[] = {&kGenericKernel, &kAvx2Kernel, &kAvx512Kernel};
#else
  const Kernel *const kernels[] = {&kGenericKernel};
#endif
  const Kernel *best = best_kernel();
  for (const Kernel *candidate : kernels) {
    if (strcmp(candidate->isa, isa) == 0) {
      selected.store(candidate, std::memory_order_relaxed);
      return true;
    }
    if (candidate == best) break; /* what follows needs more than the machine has */
  }
  return false;
}

}  // namespace kda

using namespace kda;

extern "C" {

int32_t kda_abi_version(void) { return KDA_ABI_VERSION; }

const char *kda_cpu_isa(void) { return kernel()->isa; }

void kda_run_parallel_for(void *self, int64_t count, kda_task task, void *state) {
  kda_parallel_for parallel_for;
  static_assert(sizeof parallel_for == sizeof self, "a function's address fits a pointer");
  memcpy(&parallel_for, &self, sizeof self);
  parallel_for(0, count, 1, task, state);
}

kda_status kda_cpu_check(const kda_arguments *a, char *message, size_t message_size) {
#define KDA_REQUIRE(condition, ...)             \
  if (!(condition)) {                           \
    print(message, message_size, __VA_ARGS__);  \
    return KDA_INVALID_ARGUMENT;                \
  }
#define KDA_SUPPORT(condition, ...)             \
  if (!(condition)) {                           \
    print(message, message_size, __VA_ARGS__);  \
    return KDA_UNSUPPORTED;                     \
  }
  KDA_REQUIRE(a, "arguments is NULL; it must point to a kda_arguments");
  KDA_REQUIRE(a->batch >= 0, "query has batch size %lld; it must be at least 0", (long long)a->batch);
  KDA_REQUIRE(a->num_queries >= 0, "query has %lld queries; it must have at least 0", (long long)a->num_queries);
  KDA_REQUIRE(a->num_tokens >= 1, "value has %lld tokens; it must have at least 1", (long long)a->num_tokens);
  KDA_REQUIRE(a->num_heads >= 1, "num_heads is %d; it must be at least 1", a->num_heads);
  KDA_REQUIRE(a->head_dim >= 1, "head_dim is %d; it must be at least 1", a->head_dim);
  KDA_SUPPORT(a->head_dim % 4 == 0, "head_dim is %d; the CPU kernels take multiples of 4", a->head_dim);
  KDA_REQUIRE(a->num_levels >= 1, "spatial_shapes has %d levels; it must have at least 1", a->num_levels);
  KDA_SUPPORT(a->num_levels <= KDA_MAX_LEVELS, "spatial_shapes has %d levels; the kernels take at most %d",
              a->num_levels, KDA_MAX_LEVELS);
  KDA_REQUIRE(a->num_points >= 1, "num_points is %d; it must be at least 1", a->num_points);
  KDA_SUPPORT(a->num_points <= KDA_MAX_POINTS, "num_points is %d; the kernels take at most %d", a->num_points,
              KDA_MAX_POINTS);
  KDA_REQUIRE(a->reference_width == 2 || a->reference_width == 4,
              "reference_points has a last dimension of %d; it must be 2 (x, y) or 4 (x, y, w, h)", a->reference_width);
  KDA_REQUIRE(a->dtype == KDA_FLOAT32 || a->dtype == KDA_FLOAT16 || a->dtype == KDA_BFLOAT16,
              "value has dtype %d; it must be 0 (float32), 1 (float16) or 2 (bfloat16)", a->dtype);
  KDA_REQUIRE(a->offset_dtype == a->dtype || a->offset_dtype == KDA_FLOAT32,
              "sampling_offsets has dtype %d (%s); it must be float32 or the dtype of value, %s", a->offset_dtype,
              dtype_name(a->offset_dtype), dtype_name(a->dtype));
  KDA_REQUIRE(a->spatial_shapes, "spatial_shapes is NULL; it must point to [%d, 2] int64", a->num_levels);
  int64_t tokens = 0;
  for (int l = 0; l < a->num_levels; ++l) {
    const int64_t height = a->spatial_shapes[2 * l], width = a->spatial_shapes[2 * l + 1];
    KDA_REQUIRE(height >= 1 && width >= 1, "spatial_shapes has (%lld, %lld) at level %d; both must be at least 1",
                (long long)height, (long long)width, l);
    KDA_SUPPORT(height <= kMaxSide && width <= kMaxSide,
                "spatial_shapes has (%lld, %lld) at level %d; the kernels take sides up to %lld", (long long)height,
                (long long)width, l, (long long)kMaxSide);
    tokens += height * width;
  }
  KDA_REQUIRE(tokens == a->num_tokens,
              "value has %lld tokens; it must have %lld, the sum of height * width over spatial_shapes",
              (long long)a->num_tokens, (long long)tokens);
  /* The border adds H + 3 (W + 1) tokens a level, most to a map of one row or column. */
  int64_t padded = 1;
  for (int l = 0; l < a->num_levels; ++l) padded += (a->spatial_shapes[2 * l] + 3) * (a->spatial_shapes[2 * l + 1] + 1);
  KDA_SUPPORT(padded <= kMaxTokens, "value has %lld tokens, %lld with their borders; the kernels take at most %lld",
              (long long)tokens, (long long)padded, (long long)kMaxTokens);
  if (a->batch > 0 && a->num_queries > 0) {
    const char *query = a->key_aware ? "query" : "attention_logits";
    KDA_REQUIRE(a->query, "%s is NULL; it must point to the tensor's data", query);
    KDA_REQUIRE(a->value, "value is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->reference_points, "reference_points is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->sampling_offsets, "sampling_offsets is NULL; it must point to the tensor's data");
    KDA_REQUIRE(a->output, "output is NULL; it must point to the tensor's data");
  }
#undef KDA_REQUIRE
#undef KDA_SUPPORT
  return KDA_OK;
}

size_t kda_cpu_workspace_size(const kda_arguments *a) {
  if (kda_cpu_check(a, NULL, 0) == KDA_UNSUPPORTED) return 0;
  const Plan plan = make_plan(a);
  return static_cast<size_t>(a->num_heads * plan.tokens * plan.stride * (has_own_key(a) ? 2 : 1)) * sizeof(float);
}

kda_status kda_cpu_forward(const kda_arguments *a, void *workspace, const kda_executor *executor, char *message,
                           size_t message_size) {
  const kda_status status = kda_cpu_check(a, message, message_size);
  if (status != KDA_OK) return status;
  if (a->batch == 0 || a->num_queries == 0) return KDA_OK;
  if (!workspace) {
    print(message, message_size, "workspace is NULL; it must have %zu bytes", kda_cpu_workspace_size(a));
    return KDA_INVALID_ARGUMENT;
  }
  Plan plan = make_plan(a);
  plan.value = static_cast<float *>(workspace);
  plan.key = has_own_key(a) ? plan.value + a->num_heads * plan.tokens * plan.stride : plan.value;
  for (plan.item = 0; plan.item < a->batch; ++plan.item) {
    run(executor, plan.rows, repack_task, &plan);
    run(executor, a->num_heads * plan.num_chunks, attend_task, &plan);
  }
  return KDA_OK;
}

}  // extern "C"
