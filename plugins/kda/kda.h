/* Deformable attention for DETR encoders and decoders, as plain C.
 *
 * Two operators share one arithmetic (Lite DETR, arXiv 2303.07335, section 3.3):
 *
 *   location(l, p) = ref_xy(l) + offset(l, p) / (W_l, H_l)                 references of width 2
 *                  = ref_xy(l) + offset(l, p) / P * ref_wh(l) * 0.5        references of width 4
 *   key-aware:  logit(l, p) = <query, bilinear(key, location)> / sqrt(D)
 *   otherwise:  logit(l, p) = attention_logits(l, p)
 *   output = sum over (l, p) of softmax(logit)(l, p) * bilinear(value, location)
 *
 * The softmax runs jointly over levels and points.  Sampling is bilinear with zero padding and
 * align_corners = false: pixel = location * size - 0.5.  A sample outside the map reads a zero key and a
 * zero value, hence a logit of 0, and still takes part in the softmax.  A corner outside the map contributes
 * nothing, even where the nearest pixel inside holds NaN or Inf.  Where an offset or a reference is NaN or infinite,
 * the samples that it places are outside.
 *
 * This directory includes no header of any framework.
 */
#ifndef LITEDETR_KDA_H
#define LITEDETR_KDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define KDA_API __declspec(dllexport)
#else
#define KDA_API __attribute__((visibility("default")))
#endif

/* Grows when a field or a function below changes meaning. */
#define KDA_ABI_VERSION 2

/* The most levels and points per level that the kernels take. */
#define KDA_MAX_LEVELS 8
#define KDA_MAX_POINTS 8

typedef enum kda_dtype { KDA_FLOAT32 = 0, KDA_FLOAT16 = 1, KDA_BFLOAT16 = 2 } kda_dtype;

typedef enum kda_status {
  KDA_OK = 0,
  KDA_INVALID_ARGUMENT = 1, /* a shape, type or pointer that cannot be */
  KDA_UNSUPPORTED = 2,      /* well-formed, but not built into this library */
  KDA_DEVICE_ERROR = 3      /* the CUDA runtime failed */
} kda_status;

typedef struct kda_arguments {
  int64_t batch;           /* N; may be 0 */
  int64_t num_queries;     /* Q; may be 0 */
  int64_t num_tokens;      /* S = sum over levels of H_l * W_l */
  int32_t num_heads;       /* M */
  int32_t head_dim;        /* D; a multiple of 4 (CPU) or 8 (CUDA) */
  int32_t num_levels;      /* L */
  int32_t num_points;      /* P */
  int32_t reference_width; /* 2: (x, y); 4: (x, y, w, h); in units of the padded map */
  int32_t key_aware;       /* 1: `query` holds queries; 0: it holds attention logits */
  int32_t dtype;           /* kda_dtype of query, key, value and output */
  int32_t offset_dtype;    /* kda_dtype of sampling_offsets: `dtype` or KDA_FLOAT32 */
  int32_t int32_shapes;    /* 1: spatial_shapes holds int32; 0: int64 */
  int32_t reserved;        /* 0; it fills the space before the pointers */

  const void* query;             /* [N, Q, M*D], or attention logits [N, Q, M*L*P] */
  const void* key;               /* [N, S, M*D]; NULL: the key is the value, and each sample is gathered once */
  const void* value;             /* [N, S, M*D] */
  const float* reference_points; /* [N, Q, L, reference_width] */
  const void* sampling_offsets;  /* [N, Q, M*L*P*2], in pixels (x, y) or in fractions of the reference box */
  const void* spatial_shapes;    /* [L, 2], (height, width), fine to coarse; int64, or int32 with int32_shapes */
  void* output;                  /* [N, Q, M*D] */
} kda_arguments;

/* ---- CPU ---------------------------------------------------------------------------------------------- */

/* Work on the half-open range [begin, end) of task indices. */
typedef void (*kda_task)(int64_t begin, int64_t end, void* state);

/* The caller's threads.  `run` covers [0, count) exactly once, in any order, and returns when all is done. */
typedef struct kda_executor {
  void (*run)(void* self, int64_t count, kda_task task, void* state);
  void* self;
} kda_executor;

/* A `run` for callers whose threads are reached by a function of this signature (PyTorch's stable C ABI has
 * one): set `self` to the function's address. */
typedef int32_t (*kda_parallel_for)(int64_t begin, int64_t end, int64_t grain, kda_task task, void* state);
KDA_API void kda_run_parallel_for(void* self, int64_t count, kda_task task, void* state);

/* Bytes of scratch memory that `kda_cpu_forward` wants for these shapes; 64-byte alignment.  The values of
 * the pointers are not read, except spatial_shapes. */
KDA_API size_t kda_cpu_workspace_size(const kda_arguments* arguments);

/* Checks everything that can be checked from the host: sizes, types, null pointers, and that spatial_shapes
 * adds up to num_tokens.  On failure `message` (if not NULL) receives one sentence: the tensor, what it has
 * and what it should have. */
KDA_API kda_status kda_cpu_check(const kda_arguments* arguments, char* message, size_t message_size);

/* Computes the attention.  `executor` NULL: on the calling thread.  `workspace` as sized above.  Checks as
 * `kda_cpu_check` does. */
KDA_API kda_status kda_cpu_forward(const kda_arguments* arguments, void* workspace, const kda_executor* executor,
                                   char* message, size_t message_size);

/* The gradient that `kda_cpu_backward` is given, and where it writes the others, as floats and in the shapes of the
 * tensors they belong to; what was there is overwritten. */
typedef struct kda_gradients {
  const float* output; /* [N, Q, M*D], given */
  float* query;        /* or of the attention logits */
  float* key;          /* NULL where kda_arguments has no key of its own: its part is in `value` */
  float* value;
  float* reference_points; /* NULL: not wanted */
  float* sampling_offsets;
} kda_gradients;

/* Computes the gradients of a forward pass with these arguments, whose output is not read.  FP32 storage only, others
 * answer KDA_UNSUPPORTED.  `executor` and the checks as in `kda_cpu_forward`; scratch memory, two maps of a head (four
 * with a key of its own) for every thread, is allocated.  The same bits on any number of threads. */
KDA_API kda_status kda_cpu_backward(const kda_arguments* arguments, const kda_gradients* gradients,
                                    const kda_executor* executor, char* message, size_t message_size);

/* The instruction set that `kda_cpu_forward` uses on this machine: "avx512", "avx2", "neon" or "generic". */
KDA_API const char* kda_cpu_isa(void);

/* ---- CUDA --------------------------------------------------------------------------------------------- */

/* Checks what can be checked from the host without reading device memory; `message` as in `kda_cpu_check`. */
KDA_API kda_status kda_cuda_check(const kda_arguments* arguments, char* message, size_t message_size);

/* Computes the attention on `stream` (a cudaStream_t) of the current device.  Every pointer of `arguments` is device
 * memory, spatial_shapes included; nothing is copied to the host and nothing waits, so that the call can be captured
 * in a CUDA graph.  A library that was built without nvcc answers KDA_UNSUPPORTED. */
KDA_API kda_status kda_cuda_forward(const kda_arguments* arguments, void* stream, char* message, size_t message_size);

/* KDA_ABI_VERSION of the library. */
KDA_API int32_t kda_abi_version(void);

#ifdef __cplusplus
}
#endif

#endif /* LITEDETR_KDA_H */
