/* Blocks and threads of cuda_runtime.h beside this. */
#include "cuda_runtime.h"

#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace kda {
constexpr size_t kSharedBytes = 48 << 10;
uint4 shared[kSharedBytes / sizeof(uint4)]; /* the kernels' dynamic shared memory */
}  // namespace kda

namespace emulation {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;

/* Threads that come to a barrier wait until its generation changes. */
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  float exchanged[2][kWarpSize]; /* of this generation and the one before */
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
const std::function<void()>* body;
ucontext_t scheduler;
unsigned current; /* fiber */
bool progress;    /* since the scheduler last looked */

/* AddressSanitizer wants to know of every change of stacks. */
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_bytes;

void change_context(ucontext_t* from, ucontext_t* to, const void* stack, size_t bytes) {
  void* state;
  __sanitizer_start_switch_fiber(&state, stack, bytes);
  swapcontext(from, to);
  __sanitizer_finish_switch_fiber(state, nullptr, nullptr);
}
void resume(Fiber* fiber) { change_context(&scheduler, &fiber->context, fiber->stack.get(), kStackBytes); }
void yield() { change_context(&fibers[current].context, &scheduler, scheduler_stack, scheduler_stack_bytes); }
void started() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
#else
void resume(Fiber* fiber) { swapcontext(&scheduler, &fiber->context); }
void yield() { swapcontext(&fibers[current].context, &scheduler); }
void started() {}
#endif

void run_fiber() {
  started();
  (*body)();
  fibers[current].done = progress = true;
  yield(); /* for good */
}

void wait(Barrier* barrier, unsigned expected) {
  const unsigned generation = barrier->generation;
  if (++barrier->arrived == expected) {
    barrier->arrived = 0;
    ++barrier->generation;
    progress = true;
    return;
  }
  while (barrier->generation == generation) yield();
}

void run_block(const std::vector<unsigned>& order) {
  warps.assign(blockDim.x / kWarpSize, Warp());
  block_barrier = Barrier();
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned left = blockDim.x; left > 0;) {
    progress = false;
    for (unsigned thread : order) {
      if (fibers[thread].done) continue;
      current = thread;
      threadIdx = {thread, 0, 0};
      resume(&fibers[thread]);
      if (fibers[thread].done) --left;
    }
    if (!progress) {
      fprintf(stderr, "block %u: %u threads wait at a barrier that the others do not reach\n", blockIdx.x, left);
      abort();
    }
  }
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x % kWarpSize != 0 || config.dynamicSmemBytes > kda::kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  body = &thread;
  fibers.resize(blockDim.x);
  std::vector<unsigned> order(blockDim.x);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(gridDim.x);
  char* const shared = reinterpret_cast<char*>(kda::shared);
  for (blockIdx = {0, 0, 0}; blockIdx.x < gridDim.x; ++blockIdx.x) {
    std::shuffle(order.begin(), order.end(), random);
    ASAN_UNPOISON_MEMORY_REGION(shared, kda::kSharedBytes);
    memset(shared, 0xff, kda::kSharedBytes);
    ASAN_POISON_MEMORY_REGION(shared + config.dynamicSmemBytes, kda::kSharedBytes - config.dynamicSmemBytes);
    run_block(order);
  }
  ASAN_UNPOISON_MEMORY_REGION(shared, kda::kSharedBytes);
  return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() { emulation::wait(&emulation::block_barrier, blockDim.x); }

void __syncwarp() {
  emulation::wait(&emulation::warps[threadIdx.x / emulation::kWarpSize].barrier, emulation::kWarpSize);
}

float __shfl_xor_sync(unsigned mask, float x, int distance) {
  if (mask != 0xffffffff) abort();
  const unsigned lane = threadIdx.x % emulation::kWarpSize;
  emulation::Warp& warp = emulation::warps[threadIdx.x / emulation::kWarpSize];
  float* exchanged = warp.exchanged[warp.barrier.generation % 2];
  exchanged[lane] = x;
  emulation::wait(&warp.barrier, emulation::kWarpSize);
  return exchanged[lane ^ static_cast<unsigned>(distance)];
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  static int calls = 0;
  const int counts[] = {132, 1, 16};
  *value = counts[calls++ % 3];
  return cudaSuccess;
}
