/* The CUDA operator of a library that was built without nvcc. */
#include "check.h"

extern "C" {

kda_status kda_cuda_check(const kda_arguments*, char* message, size_t message_size) {
  kda::print(message, message_size, "this library was built without CUDA: build it again with nvcc in the PATH");
  return KDA_UNSUPPORTED;
}

kda_status kda_cuda_forward(const kda_arguments* arguments, void*, char* message, size_t message_size) {
  return kda_cuda_check(arguments, message, message_size);
}

}  // extern "C"
