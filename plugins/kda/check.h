/* The checks of kda_arguments that need neither the device nor the values of a tensor. */
#ifndef LITEDETR_KDA_CHECK_H
#define LITEDETR_KDA_CHECK_H

#include "kda.h"

namespace kda {

/* Pixel coordinates are FP32 and their floors int32: a side of 2^22 keeps a quarter pixel, and a map's tokens fit. */
constexpr int64_t kMaxSide = int64_t{1} << 22;
constexpr int64_t kMaxTokens = int64_t{1} << 30;

/* spatial_shapes, flat, where the host can read it. */
inline int64_t read_side(const kda_arguments* a, int index) {
  return a->int32_shapes ? static_cast<const int32_t*>(a->spatial_shapes)[index]
                         : static_cast<const int64_t*>(a->spatial_shapes)[index];
}

/* printf into `message`, of `size` bytes with the final zero; nothing where it is NULL. */
void print(char* message, size_t size, const char* format, ...) __attribute__((format(printf, 3, 4)));

/* Sizes, types and null pointers.  The kernels, `kernels` in the message ("CUDA"), take head_dim in multiples of
 * `dim_multiple`. */
kda_status check_sizes(const kda_arguments* arguments, const char* kernels, int32_t dim_multiple, char* message,
                       size_t message_size);

}  // namespace kda

#endif /* LITEDETR_KDA_CHECK_H */
