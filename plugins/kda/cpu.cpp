/* The CPU operator: checks, choice of the kernel, division of the work.  The arithmetic is in cpu_kernel.cpp. */
#include <string.h>

#include <atomic>

#include "check.h"
#include "cpu_kernel.h"

namespace kda {
namespace {

/* Queries of one head that a task takes: some 20 microseconds, so that both a dynamic scheduler's overhead and a static
 * one's imbalance stay small. */
constexpr int64_t kQueryChunk = 128;

const Kernel* best_kernel() {
#if defined(KDA_X86)
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

std::atomic<const Kernel*> selected{nullptr};

const Kernel* kernel() {
  const Kernel* chosen = selected.load(std::memory_order_relaxed);
  if (!chosen) {
    chosen = best_kernel();
    selected.store(chosen, std::memory_order_relaxed);
  }
  return chosen;
}

bool has_own_key(const kda_arguments* a) { return a->key_aware && a->key; }

/* Whether the samples of a few queries cost less where the value lies than its repacking would. */
bool fits_in_place(const kda_arguments* a) {
  const bool built = a->dtype == KDA_FLOAT32 && !has_own_key(a) && a->num_levels == 4 && a->num_points == 4 &&
                     (a->head_dim == 16 || a->head_dim == 32 || a->head_dim == 64);
  return built && a->num_queries * 16 < a->num_tokens && a->num_tokens * a->num_heads * a->head_dim <= INT32_MAX;
}

Plan make_plan(const kda_arguments* a) {
  Plan plan = {};
  plan.arguments = a;
  const int lanes = kernel()->lanes;
  plan.stride = (a->head_dim + lanes - 1) / lanes * lanes;
  int64_t token = 0;
  for (int l = 0; l < a->num_levels; ++l) {
    Level& level = plan.levels[l];
    level.height = static_cast<int32_t>(read_side(a, 2 * l));
    level.width = static_cast<int32_t>(read_side(a, 2 * l + 1));
    level.pitch = level.width + 1;
    level.first_token = token;
    level.first_row = plan.rows;
    level.origin = static_cast<int32_t>(plan.tokens + 2 * level.pitch + 1);
    token += int64_t{level.height} * level.width;
    plan.rows += level.height + 3;
    plan.tokens += int64_t{level.height + 3} * level.pitch;
  }
  plan.tokens += 1; /* column W of the last level's row H */
  plan.in_place = fits_in_place(a);
  const int64_t chunk = plan.in_place ? kQueryChunk / 8 : kQueryChunk; /* of all heads, usually eight */
  plan.num_chunks = (a->num_queries + chunk - 1) / chunk;
  plan.query_chunk = plan.num_chunks ? (a->num_queries + plan.num_chunks - 1) / plan.num_chunks : 0;
  return plan;
}

/* Floats of the workspace that the value takes, or a key of its own. */
int64_t map_floats(const Plan& plan) { return plan.arguments->num_heads * plan.tokens * plan.stride; }

/* Queries are taken tile by tile of the finest level, about 8 x 8 pixels each: then those that follow one another, from
 * whichever level they are, find what they sample in a near cache. */
constexpr int64_t kTileSide = 8, kMaxTiles = 64; /* along a side */

int64_t count_tiles(int64_t side) {
  const int64_t tiles = (side + kTileSide - 1) / kTileSide;
  return tiles < kMaxTiles ? tiles : kMaxTiles;
}

/* The tile of a coordinate; NaN is in the first. */
int64_t find_tile(float x, int64_t tiles) {
  return !(x > 0) ? 0 : x < 1 ? static_cast<int64_t>(x * static_cast<float>(tiles)) : tiles - 1;
}

/* Fills plan->order by a counting sort. */
void order_queries(const Plan* plan) {
  const kda_arguments* a = plan->arguments;
  const int64_t rows = count_tiles(plan->levels[0].height), columns = count_tiles(plan->levels[0].width);
  const int64_t width = int64_t{a->num_levels} * a->reference_width;
  const float* const references = a->reference_points + plan->item * a->num_queries * width;
  const auto tile_of = [&](int64_t query) {
    const float* centre = references + query * width;
    return find_tile(centre[1], rows) * columns + find_tile(centre[0], columns);
  };
  int64_t first[kMaxTiles * kMaxTiles + 1] = {};
  for (int64_t query = 0; query < a->num_queries; ++query) ++first[tile_of(query) + 1];
  for (int64_t tile = 0; tile < rows * columns; ++tile) first[tile + 1] += first[tile];
  for (int64_t query = 0; query < a->num_queries; ++query) plan->order[first[tile_of(query)]++] = query;
}

void repack_task(int64_t begin, int64_t end, void* state) {
  kernel()->repack(static_cast<const Plan*>(state), begin, end);
}

void attend_task(int64_t begin, int64_t end, void* state) {
  kernel()->attend(static_cast<const Plan*>(state), begin, end);
}

void run(const kda_executor* executor, int64_t count, kda_task task, Plan* plan) {
  if (executor) {
    executor->run(executor->self, count, task, plan);
  } else {
    task(0, count, plan);
  }
}

}  // namespace

bool select_isa(const char* isa) {
#if defined(KDA_X86)
  const Kernel* const kernels[] = {&kGenericKernel, &kAvx2Kernel, &kAvx512Kernel};
#else
  const Kernel* const kernels[] = {&kGenericKernel};
#endif
  const Kernel* best = best_kernel();
  for (const Kernel* candidate : kernels) {
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

const char* kda_cpu_isa(void) { return kernel()->isa; }

void kda_run_parallel_for(void* self, int64_t count, kda_task task, void* state) {
  kda_parallel_for parallel_for;
  static_assert(sizeof parallel_for == sizeof self, "a function's address fits a pointer");
  memcpy(&parallel_for, &self, sizeof self);
  parallel_for(0, count, 1, task, state);
}

kda_status kda_cpu_check(const kda_arguments* a, char* message, size_t message_size) {
  const kda_status status = check_sizes(a, "CPU", 4, message, message_size);
  if (status != KDA_OK) return status;
  int64_t tokens = 0, padded = 1;
  for (int l = 0; l < a->num_levels; ++l) {
    const int64_t height = read_side(a, 2 * l), width = read_side(a, 2 * l + 1);
    if (height < 1 || width < 1) {
      print(message, message_size, "spatial_shapes has (%lld, %lld) at level %d; both must be at least 1",
            (long long)height, (long long)width, l);
      return KDA_INVALID_ARGUMENT;
    }
    if (height > kMaxSide || width > kMaxSide) {
      print(message, message_size, "spatial_shapes has (%lld, %lld) at level %d; the kernels take sides up to %lld",
            (long long)height, (long long)width, l, (long long)kMaxSide);
      return KDA_UNSUPPORTED;
    }
    tokens += height * width;
    padded += (height + 3) * (width + 1); /* with the border, see Level */
  }
  if (tokens != a->num_tokens) {
    print(message, message_size,
          "value has %lld tokens; it must have %lld, the sum of height * width over spatial_shapes",
          (long long)a->num_tokens, (long long)tokens);
    return KDA_INVALID_ARGUMENT;
  }
  const int64_t most = INT32_MAX / (a->head_dim + 15); /* offsets within a head's map are int32, in floats */
  if (padded > most) {
    print(message, message_size, "value has %lld tokens, %lld with their borders; the CPU kernels take at most %lld",
          (long long)tokens, (long long)padded, (long long)most);
    return KDA_UNSUPPORTED;
  }
  return KDA_OK;
}

size_t kda_cpu_workspace_size(const kda_arguments* a) {
  kda_arguments shapes = *a;
  shapes.batch = 0; /* an empty batch needs no pointers */
  if (kda_cpu_check(&shapes, NULL, 0) != KDA_OK) return 0;
  const Plan plan = make_plan(a);
  if (plan.in_place) return 0;
  return static_cast<size_t>(map_floats(plan) * (has_own_key(a) ? 2 : 1)) * sizeof(float) +
         static_cast<size_t>(a->num_queries) * sizeof(int64_t);
}

kda_status kda_cpu_forward(const kda_arguments* a, void* workspace, const kda_executor* executor, char* message,
                           size_t message_size) {
  const kda_status status = kda_cpu_check(a, message, message_size);
  if (status != KDA_OK) return status;
  if (a->batch == 0 || a->num_queries == 0) return KDA_OK;
  Plan plan = make_plan(a);
  if (!plan.in_place && !workspace) {
    print(message, message_size, "workspace is NULL; it must have %zu bytes", kda_cpu_workspace_size(a));
    return KDA_INVALID_ARGUMENT;
  }
  plan.value = static_cast<float*>(workspace);
  plan.key = has_own_key(a) ? plan.value + map_floats(plan) : plan.value;
  plan.order = reinterpret_cast<int64_t*>(plan.key + map_floats(plan));
  for (plan.item = 0; plan.item < a->batch; ++plan.item) {
    if (plan.in_place) {
      run(executor, plan.num_chunks, attend_task, &plan);
      continue;
    }
    order_queries(&plan);
    run(executor, plan.rows, repack_task, &plan);
    run(executor, plan.num_chunks * a->num_heads, attend_task, &plan);
  }
  return KDA_OK;
}

}  // extern "C"
