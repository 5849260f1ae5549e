# Enables CUDA where nvcc and the static runtime are found, and sets LITEDETR_CUDA_FLAGS, the compiler's options for the
# architectures.  Elsewhere CMAKE_CUDA_COMPILER is false, and what needs CUDA is left out.  (To leave it out on purpose:
# -DCMAKE_CUDA_COMPILER=NOTFOUND.)  Included by the top CMakeLists.txt: a language is enabled for the whole tree.

# Turing, Ampere, Ada, Hopper, Blackwell; 87 is Jetson Orin and 110 Jetson Thor.
set(LITEDETR_CUDA_CODES 75 80 86 87 89 90 100 110 120)

# With OFF, CMake (which may be older than some of these) adds no architecture of its own.
set(LITEDETR_CUDA_FLAGS)
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  find_package(CUDAToolkit QUIET)
  if(TARGET CUDA::cudart_static)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    enable_language(CUDA)
  else()
    set(CMAKE_CUDA_COMPILER NOTFOUND)
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "CUDA is left out: nvcc or the static CUDA runtime (libcudart_static) was not found")
  return()
endif()

if(CMAKE_CUDA_ARCHITECTURES)
  message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES}")
  return()
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known)
set(codes)
foreach(code IN LISTS LITEDETR_CUDA_CODES)
  if(known MATCHES "sm_${code}[^0-9]")
    list(APPEND codes ${code})
  endif()
endforeach()
# The kernels use nothing newer than Ampere, so one pass of the compiler's front half serves all machine codes from there
# on, and one Turing, which rounds to BF16 with integers.  PTX is the oldest's: every GPU without a code of its own, newer
# ones included, can compile it.
list(GET codes 0 oldest)
set(ampere_and_newer ${codes})
list(REMOVE_ITEM ampere_and_newer 75)
list(JOIN ampere_and_newer ",sm_" machine_codes)
set(LITEDETR_CUDA_FLAGS
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_80,code=[sm_${machine_codes}]>"
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_${oldest},code=compute_${oldest}>")
if(75 IN_LIST codes)
  list(APPEND LITEDETR_CUDA_FLAGS "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_75,code=sm_75>")
endif()
message(STATUS "CUDA architectures: ${codes}, and PTX of ${oldest}")
