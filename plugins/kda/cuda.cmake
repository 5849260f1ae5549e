# The CUDA kernels, into both libraries; a stub that says so where there is no CUDA compiler.  Included by
# CMakeLists.txt.

if(NOT CMAKE_CUDA_COMPILER)
  target_sources(litedetr_kda_static PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cuda_stub.cpp)
  target_sources(litedetr_kda PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cuda_stub.cpp)
  return()
endif()

# The two libraries share the objects: compiling for eight architectures is the long part of the build.
add_library(litedetr_kda_cuda OBJECT
  ${CMAKE_CURRENT_LIST_DIR}/cuda.cpp
  ${CMAKE_CURRENT_LIST_DIR}/cuda_float32.cu
  ${CMAKE_CURRENT_LIST_DIR}/cuda_float16.cu
  ${CMAKE_CURRENT_LIST_DIR}/cuda_bfloat16.cu)
target_link_libraries(litedetr_kda_cuda PRIVATE CUDA::cudart_static)
# ptxas has its own -O3; this is the host's half.
target_compile_options(litedetr_kda_cuda PRIVATE ${LITEDETR_CUDA_FLAGS})
# Loads on a machine without a driver: the static runtime looks for one at the first call.
foreach(library litedetr_kda_static litedetr_kda)
  target_sources(${library} PRIVATE $<TARGET_OBJECTS:litedetr_kda_cuda>)
  target_link_libraries(${library} PRIVATE CUDA::cudart_static)
endforeach()
