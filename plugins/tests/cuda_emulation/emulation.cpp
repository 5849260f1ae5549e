/* Blocks and threads of cuda_runtime.h beside this. */
#include "cuda_runtime.h"

#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_kernel.h"

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
      fprintf(stderr, "block %u, %u, %u: %u threads wait at a barrier that the others do not reach\n", blockIdx.x,
              blockIdx.y, blockIdx.z, left);
      abort();
    }
  }
}

/* ---- device memory ---- */

/* A mapping whose last page stays closed; the data ends before it, at a multiple of 16 bytes. */
struct Allocation {
  size_t mapped, bytes; /* of the mapping, the closed page not counted; and asked for */
  char* mapping;
};
std::map<char*, Allocation> allocations; /* by the address that cudaMalloc gave */

/* Opens device memory while it lives. */
class DeviceAccess {
 public:
  DeviceAccess() { protect(PROT_READ | PROT_WRITE); }
  ~DeviceAccess() { protect(PROT_NONE); }

 private:
  static void protect(int access) {
    for (const auto& [data, allocation] : allocations) {
      if (mprotect(allocation.mapping, allocation.mapped, access) != 0) perror("mprotect"), abort();
    }
  }
};

}  // namespace

cudaStream_t last_stream;
bool only_last_block;

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  last_stream = config.stream;
  const bool fits = blockDim.x > 0 && blockDim.x <= kda::kMaxThreads && blockDim.x % kWarpSize == 0 &&
                    config.dynamicSmemBytes <= kda::kSharedBytes && gridDim.x > 0 && gridDim.x <= 0x7fffffff &&
                    gridDim.y > 0 && gridDim.y <= 0xffff && gridDim.z > 0 && gridDim.z <= 0xffff;
  if (!fits) return cudaErrorInvalidConfiguration;
  const DeviceAccess access;
  body = &thread;
  fibers.resize(blockDim.x);
  std::vector<unsigned> order(blockDim.x);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(gridDim.x);
  char* const shared = reinterpret_cast<char*>(kda::shared);
  const uint3 first = only_last_block ? uint3{gridDim.x - 1, gridDim.y - 1, gridDim.z - 1} : uint3{0, 0, 0};
  for (blockIdx.z = first.z; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = first.y; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = first.x; blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::shuffle(order.begin(), order.end(), random);
        ASAN_UNPOISON_MEMORY_REGION(shared, kda::kSharedBytes);
        memset(shared, 0xff, kda::kSharedBytes);
        ASAN_POISON_MEMORY_REGION(shared + config.dynamicSmemBytes, kda::kSharedBytes - config.dynamicSmemBytes);
        run_block(order);
      }
    }
  }
  ASAN_UNPOISON_MEMORY_REGION(shared, kda::kSharedBytes);
  return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() { emulation::wait(&emulation::block_barrier, blockDim.x); }

void __syncwarp() {
  emulation::wait(&emulation::warps[threadIdx.x / emulation::kWarpSize].barrier, emulation::kWarpSize);
}

/* What all lanes of the warp bring. */
static const float* exchange(unsigned mask, float x) {
  if (mask != 0xffffffff) abort();
  emulation::Warp& warp = emulation::warps[threadIdx.x / emulation::kWarpSize];
  float* exchanged = warp.exchanged[warp.barrier.generation % 2];
  exchanged[threadIdx.x % emulation::kWarpSize] = x;
  emulation::wait(&warp.barrier, emulation::kWarpSize);
  return exchanged;
}

float __shfl_xor_sync(unsigned mask, float x, int distance) {
  const unsigned lane = threadIdx.x % emulation::kWarpSize; /* of this thread: others run before exchange returns */
  return exchange(mask, x)[lane ^ static_cast<unsigned>(distance)];
}

int __any_sync(unsigned mask, int predicate) {
  const float* const predicates = exchange(mask, predicate != 0);
  return std::any_of(predicates, predicates + emulation::kWarpSize, [](float x) { return x != 0; });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  static int calls = 0;
  const int counts[] = {132, 1, 16};
  *value = counts[calls++ % 3];
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  using namespace emulation;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), rounded = (bytes + 15) / 16 * 16;
  const size_t mapped = (rounded + page - 1) / page * page;
  /* Pages that nobody touches take no memory: tensors may be as large as addresses. */
  void* const mapping = mmap(nullptr, mapped + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return cudaErrorMemoryAllocation;
  const Allocation allocation = {mapped, bytes, static_cast<char*>(mapping)};
  char* const start = allocation.mapping + (mapped - rounded);
  allocations[start] = allocation;
  ASAN_POISON_MEMORY_REGION(allocation.mapping, mapped - rounded);
  ASAN_POISON_MEMORY_REGION(start + bytes, rounded - bytes);
  return *data = start, cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  using namespace emulation;
  if (!data) return cudaSuccess;
  const auto found = allocations.find(static_cast<char*>(data));
  if (found == allocations.end()) return cudaErrorInvalidValue;
  const Allocation& allocation = found->second;
  /* What cudaMalloc poisoned, and no more: a large tensor's shadow would take memory. */
  char* const start = found->first;
  ASAN_UNPOISON_MEMORY_REGION(allocation.mapping, start - allocation.mapping);
  ASAN_UNPOISON_MEMORY_REGION(start + allocation.bytes,
                              allocation.mapping + allocation.mapped - start - allocation.bytes);
  munmap(allocation.mapping, allocation.mapped + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  allocations.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* data, int byte, size_t bytes) {
  const emulation::DeviceAccess access;
  return memset(data, byte, bytes), cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  const emulation::DeviceAccess access;
  return memcpy(target, source, bytes), cudaSuccess;
}
