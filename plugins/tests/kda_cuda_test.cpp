/* The CUDA operator against its definition in double precision:
 *   kda_cuda_test [rounds of the sweep]
 * Compiled with the CUDA toolkit it needs a device, and exits with 77 where there is none; compiled with the headers in
 * cuda_emulation it runs the same kernels on the host. */
#include <cuda_runtime.h>
#include <stdlib.h>

#include "cases.h"

namespace {

constexpr int kSkipped = 77;
constexpr int32_t kDtypes[] = {KDA_FLOAT32, KDA_FLOAT16, KDA_BFLOAT16};

/* Device memory of exactly the size of a tensor, so that AddressSanitizer and compute-sanitizer see a wrong address. */
class DeviceMemory {
 public:
  DeviceMemory(const void* source, size_t bytes) {
    if (bytes == 0) return;
    CHECK(cudaMalloc(&data, bytes) == cudaSuccess, "%zu bytes", bytes);
    if (source) CHECK(cudaMemcpy(data, source, bytes, cudaMemcpyDefault) == cudaSuccess, "%zu bytes", bytes);
    if (!source) CHECK(cudaMemset(data, 0xff, bytes) == cudaSuccess, "%zu bytes", bytes); /* NaN */
  }
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data); }
  void* data = nullptr;
};

size_t bytes_of(const Tensor& tensor) { return tensor.size() * (tensor.dtype == KDA_FLOAT32 ? 4 : 2); }

kda_status run_on_cuda(Problem* problem) {
  const DeviceMemory query(problem->query.data(), bytes_of(problem->query));
  const DeviceMemory key(problem->key.data(), bytes_of(problem->key));
  const DeviceMemory value(problem->value.data(), bytes_of(problem->value));
  const DeviceMemory references(problem->references.data(), problem->references.size() * sizeof(float));
  const DeviceMemory offsets(problem->offsets.data(), bytes_of(problem->offsets));
  const DeviceMemory output(nullptr, bytes_of(problem->output));
  kda_arguments a = problem->arguments();
  const size_t side_bytes = a.int32_shapes ? sizeof(int32_t) : sizeof(int64_t);
  const DeviceMemory shapes(a.spatial_shapes, problem->shape.levels.size() * side_bytes);
  a.query = query.data;
  a.key = key.data;
  a.value = value.data;
  a.reference_points = static_cast<float*>(references.data);
  a.sampling_offsets = offsets.data;
  a.spatial_shapes = shapes.data;
  a.output = output.data;
  char message[256] = "";
  const kda_status status = kda_cuda_forward(&a, nullptr, message, sizeof message);
  CHECK(status == KDA_OK, "%s", message);
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaSuccess, "%s: %s", cudaGetErrorString(error), describe(problem->shape).c_str());
  if (bytes_of(problem->output)) {
    cudaMemcpy(problem->output.data(), output.data, bytes_of(problem->output), cudaMemcpyDefault);
  }
  return status;
}

/* The host does not see the shapes: wrong ones give wrong numbers, but nothing is read that is not there. */
void test_wrong_spatial_shapes(const Device& device) {
  for (int64_t wrong : {int64_t{-3}, int64_t{0}, int64_t{9}, (int64_t{1} << 32) + 100, INT64_MAX}) {
    for (int where = 0; where < 4; ++where) {
      Shape s;
      s.queries = 20;
      s.dim = 16;
      s.levels = {8, 8, 4, 4};
      for (const bool int32_shapes : {false, true}) {
        s.int32_shapes = int32_shapes;
        Problem problem(s);
        problem.randomise(5);
        problem.shape.levels[where] = wrong;
        run(device, &problem);
        for (size_t i = 0; i < problem.output.size(); ++i) CHECK(isfinite(problem.output.get(i)), "output %zu", i);
      }
    }
  }
}

/* The same rows in other batch items and other blocks give the same bits, and so does a second run. */
void test_identical_rows(const Device& device) {
  for (int32_t dtype : kDtypes) {
    Shape s;
    s.batch = 2;
    s.queries = 70;
    s.heads = 2;
    s.dim = 32;
    s.points = 4;
    s.levels = {9, 13, 5, 7, 3, 4, 2, 2};
    s.dtype = s.offset_dtype = dtype;
    Problem problem(s);
    problem.randomise(13);
    const auto repeat = [](Tensor* tensor, size_t target, size_t count) {
      for (size_t i = 0; i < count; ++i) tensor->set(target + i, tensor->get(i));
    };
    /* The last query of an item repeats the first ... */
    const size_t row = s.heads * s.dim, offsets = s.heads * 16 * 2, references = 4 * 2;
    repeat(&problem.query, (s.queries - 1) * row, row);
    repeat(&problem.offsets, (s.queries - 1) * offsets, offsets);
    std::copy_n(problem.references.begin(), references, problem.references.begin() + (s.queries - 1) * references);
    /* ... and the second item the first item. */
    for (Tensor* tensor : {&problem.query, &problem.value, &problem.offsets}) {
      repeat(tensor, tensor->size() / 2, tensor->size() / 2);
    }
    const size_t half = problem.references.size() / 2;
    std::copy_n(problem.references.begin(), half, problem.references.begin() + half);
    check_against_definition(device, &problem);
    Problem again = problem;
    run(device, &again);
    const Tensor& output = problem.output;
    for (size_t i = 0; i < output.size(); ++i) {
      CHECK(output.get(i) == again.output.get(i), "output %zu: a second run differs", i);
      CHECK(output.get(i) == output.get(i % (output.size() / 2)), "output %zu: items differ", i);
    }
    for (size_t i = 0; i < row; ++i) CHECK(output.get(i) == output.get((s.queries - 1) * row + i), "blocks differ");
  }
}

void test_messages() {
  Shape s;
  s.dim = 8;
  s.levels = {4, 8};
  Problem problem(s);
  const auto expect = [&](const char* what, kda_status status, void (*change)(kda_arguments*)) {
    kda_arguments a = problem.arguments();
    /* Never followed: the checks come first. */
    a.query = a.value = a.sampling_offsets = a.output = reinterpret_cast<void*>(0x1000);
    change(&a);
    char message[256] = "", forward_message[256] = "";
    CHECK(kda_cuda_check(&a, message, sizeof message) == status, "%s", message);
    CHECK(strcmp(message, what) == 0, "got  '%s'\n  want '%s'", message, what);
    CHECK(kda_cuda_forward(&a, nullptr, forward_message, sizeof forward_message) == status, "%s", what);
    CHECK(strcmp(message, forward_message) == 0, "%s", forward_message);
    CHECK(kda_cuda_check(&a, nullptr, 0) == status, "%s", what);
  };
  expect("head_dim is 12; the CUDA kernels take multiples of 8", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->head_dim = 12; });
  expect("head_dim is 136; the CUDA kernels take at most 128", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->head_dim = 136; });
  expect("num_points is 9; the kernels take at most 8", KDA_UNSUPPORTED, [](kda_arguments* a) { a->num_points = 9; });
  expect("spatial_shapes has 9 levels; the kernels take at most 8", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->num_levels = 9; });
  expect("reference_points has a last dimension of 3; it must be 2 (x, y) or 4 (x, y, w, h)", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->reference_width = 3; });
  expect(
      "sampling_offsets is float16 where value is float32; it must be float32 or the type of value: cast the offsets "
      "to float32, or export the model again",
      KDA_INVALID_ARGUMENT, [](kda_arguments* a) { a->offset_dtype = KDA_FLOAT16; });
  expect("query is NULL; it must point to the tensor's data", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->query = nullptr; });
  expect("value starts at address 0x1008; it must be a multiple of 16: pass a copy", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->value = reinterpret_cast<void*>(0x1008); });
  expect("sampling_offsets starts at address 0x1004; it must be a multiple of 8: pass a copy", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->sampling_offsets = reinterpret_cast<void*>(0x1004); });
  expect("query has 65536 x 65536 rows of 1 heads; the CUDA kernels take at most 2147483647 heads", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->batch = a->num_queries = 65536; });
}

}  // namespace

int main(int argc, char** argv) {
  test_messages();
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf(failures ? "%d checks failed\n" : "no CUDA device: only the messages were checked\n", failures);
    return failures ? 1 : kSkipped;
  }
  const Device device = {"CUDA", 8, 128, run_on_cuda};
  test_cases(device, argc > 1 ? atoi(argv[1]) : 60);
  test_wrong_spatial_shapes(device);
  test_identical_rows(device);
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
