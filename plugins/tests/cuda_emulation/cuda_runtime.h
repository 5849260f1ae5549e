/* Stands in for the CUDA toolkit's header of this name, so that the kernels' own sources compile as C++ and run on the
 * host: the threads of a block are fibers of one thread, blocks run one after another.  It has what plugins/kda and its
 * test use, no more.  A missing barrier shows as wrong results (fibers run in changing orders, shared memory starts as
 * NaN), a barrier that some threads miss as an abort, and so does a misaligned load or store of global memory.  Device
 * memory can be touched by kernels and copies alone, ends at a page that nobody can touch, and is exact to the byte
 * under AddressSanitizer. */
#ifndef LITEDETR_TESTS_CUDA_RUNTIME_H
#define LITEDETR_TESTS_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

/* ---- the language ------------------------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __shared__ /* extern arrays only: emulation.cpp defines them */
#define __forceinline__ inline
#define __grid_constant__
/* A kernel that is bounded to fewer threads than the largest block has does not compile: there is no such alignment. */
#define __launch_bounds__(threads, blocks) __attribute__((aligned((threads) >= kda::kMaxThreads ? 16 : 3)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

template <class T>
const T* aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0) return address;
  fprintf(stderr, "%zu bytes at %p: misaligned\n", sizeof(T), static_cast<const void*>(address));
  abort();
}
template <class T>
T __ldg(const T* address) {
  return *aligned(address);
}
template <class T>
T __ldcs(const T* address) {
  return *aligned(address);
}
template <class T>
void __stwb(T* address, T value) {
  *const_cast<T*>(aligned(address)) = value;
}

/* These return when all threads of the block, or of the warp, have come. */
void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(unsigned mask, float x, int distance);
int __any_sync(unsigned mask, int predicate);

/* ---- the runtime -------------------------------------------------------------------------------------- */

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyDefault };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
extern cudaStream_t last_stream; /* that a kernel was launched on */
/* Launches run nothing but their last block, for tensors whose size is that of addresses only. */
extern bool only_last_block;
}  // namespace emulation
#define KDA_CUDA_EMULATION 1

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulation::launch(*config, [&] { kernel(arguments...); });
}

/* Differs from call to call, so that launches of all shapes occur. */
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "an error"; }
inline const char* cudaGetErrorString(cudaError_t) { return "of the emulation"; }
cudaError_t cudaMalloc(void** data, size_t bytes);
cudaError_t cudaFree(void* data);
cudaError_t cudaMemset(void* data, int byte, size_t bytes);
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind);

#endif /* LITEDETR_TESTS_CUDA_RUNTIME_H */
