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

/* Device memory of exactly the size of a tensor, so that AddressSanitizer and compute-sanitizer see a wrong address; it
 * starts `shift` bytes behind where memory starts, which is aligned to more than anything needs. */
class DeviceMemory {
 public:
  DeviceMemory(const void* source, size_t bytes, size_t shift = 0) {
    if (bytes == 0) return;
    CHECK(cudaMalloc(&memory, bytes + shift) == cudaSuccess, "%zu bytes", bytes);
    data = static_cast<char*>(memory) + shift;
    if (source) CHECK(cudaMemcpy(data, source, bytes, cudaMemcpyDefault) == cudaSuccess, "%zu bytes", bytes);
    if (!source) CHECK(cudaMemset(data, 0xff, bytes) == cudaSuccess, "%zu bytes", bytes); /* NaN */
  }
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(memory); }
  void* data = nullptr;

 private:
  void* memory = nullptr;
};

/* Whether tensors start where they may at the least. */
bool least_alignment = false;

size_t bytes_of(const Tensor& tensor) { return tensor.size() * (tensor.dtype == KDA_FLOAT32 ? 4 : 2); }

kda_status run_on_cuda(Problem* problem) {
  kda_arguments a = problem->arguments();
  /* 16 bytes, but for what a kernel of any shape reads number by number. */
  const bool usual = a.num_levels == 4 && a.num_points == 4;
  const auto shift = [&](size_t bytes) { return !least_alignment ? 0 : usual ? 16 : bytes; };
  const size_t element = a.dtype == KDA_FLOAT32 ? 4 : 2, offset = a.offset_dtype == KDA_FLOAT32 ? 8 : 4;
  const DeviceMemory query(problem->query.data(), bytes_of(problem->query), shift(a.key_aware ? 16 : element));
  const DeviceMemory key(problem->key.data(), bytes_of(problem->key), shift(16));
  const DeviceMemory value(problem->value.data(), bytes_of(problem->value), shift(16));
  const DeviceMemory references(problem->references.data(), problem->references.size() * sizeof(float), shift(4));
  const DeviceMemory offsets(problem->offsets.data(), bytes_of(problem->offsets), shift(offset));
  const DeviceMemory output(nullptr, bytes_of(problem->output), shift(16));
  const size_t side_bytes = a.int32_shapes ? sizeof(int32_t) : sizeof(int64_t);
  const DeviceMemory shapes(a.spatial_shapes, problem->shape.levels.size() * side_bytes, least_alignment * side_bytes);
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
    for (int where = 0; where < 8; ++where) {
      Shape s;
      s.queries = where < 4 ? 20 : 80; /* all tokens: their order depends on the shapes */
      s.dim = 16;
      s.levels = {8, 8, 4, 4};
      for (const bool int32_shapes : {false, true}) {
        s.int32_shapes = int32_shapes;
        Problem problem(s);
        problem.randomise(5);
        problem.shape.levels[where % 4] = wrong;
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

/* Queries that are the tokens of the last levels, which blocks take in an order of their own, and one more or less. */
void test_queries_of_levels(const Device& device) {
  for (int levels = 1; levels <= 4; ++levels) {
    for (int64_t more : {-1, 0, 1}) {
      Shape s;
      s.batch = 2;
      s.heads = 2;
      s.dim = 32;
      s.points = levels % 2 ? 4 : 3;
      s.levels = {19, 13, 16, 7, 9, 5, 2, 3};
      s.queries = more;
      for (int l = 4 - levels; l < 4; ++l) s.queries += s.levels[2 * l] * s.levels[2 * l + 1];
      Problem problem(s);
      problem.randomise(levels);
      check_against_definition(device, &problem);
    }
  }
}

/* Tensors need not be aligned to more than kda_cuda_check asks for. */
void test_least_alignment(const Device& device) {
  least_alignment = true;
  for (int32_t dtype : kDtypes) {
    for (int kind = 0; kind < 16; ++kind) {
      Shape s;
      s.queries = 20;
      s.dim = kind % 2 ? 64 : 32;
      s.reference_width = kind / 2 % 2 ? 4 : 2;
      s.key_aware = kind / 4 % 2;
      s.dtype = dtype;
      s.offset_dtype = kind % 3 ? dtype : KDA_FLOAT32;
      s.int32_shapes = kind % 3 == 1;
      s.points = kind / 8 ? 4 : 3;
      s.levels = {5, 7, 4, 3, 2, 2, 1, 1};
      Problem problem(s);
      problem.randomise(kind);
      check_against_definition(device, &problem);
    }
  }
  least_alignment = false;
}

#ifdef KDA_CUDA_EMULATION
void test_stream() {
  Shape s;
  s.dim = 8;
  Problem problem(s);
  problem.randomise(1);
  const kda_arguments a = problem.arguments();
  void* const stream = &problem; /* any address: the emulation does not follow it */
  CHECK(kda_cuda_forward(&a, stream, nullptr, 0) == KDA_OK, "stream");
  CHECK(emulation::last_stream == stream, "the kernel was launched on another stream");
}

/* Tensors of 2^32 elements and more, of which a few are touched: the last cell of a problem of one head and one query
 * stands where the last cell of two items lies, of `queries` queries, `heads` heads and a first level of `side` x
 * `side` tokens. */
void test_large_tensors(int64_t queries, int32_t heads, int64_t side) {
  constexpr int64_t kItems = 2;
  for (int32_t dtype : kDtypes) {
    for (int kind = 0; kind < 6; ++kind) {
      Shape s;
      s.dim = 32;
      s.points = kind % 2 ? 4 : 3;
      s.levels = {2, 2, 2, 3, 2, 1, 1, 1};
      s.key_aware = kind / 2 > 0;
      s.own_key = kind / 2 > 1;
      s.dtype = s.offset_dtype = dtype;
      Problem problem(s);
      problem.randomise(kind);
      kda_arguments a = problem.arguments();
      const size_t bytes = dtype == KDA_FLOAT32 ? 4 : 2;
      const int64_t cells = kItems * queries * heads, samples = int64_t{a.num_levels} * a.num_points;
      const int64_t more = side * side - 4; /* tokens that the first level has before the small one's */
      a.batch = kItems;
      a.num_heads = heads;
      a.num_queries = queries;
      a.num_tokens += more;
      const std::vector<int64_t> shapes = {side, side, 2, 3, 2, 1, 1, 1};
      /* The small first level is the lower right corner of the large one. */
      if (more) {
        problem.references[0] = 1 - (1 - problem.references[0]) * 2 / static_cast<float>(side);
        problem.references[1] = 1 - (1 - problem.references[1]) * 2 / static_cast<float>(side);
      }
      const std::vector<double> expected = [&] {
        Problem exact = problem;
        if (more) {
          exact.references[0] = 1 - (1 - exact.references[0]) * static_cast<float>(side) / 2;
          exact.references[1] = 1 - (1 - exact.references[1]) * static_cast<float>(side) / 2;
        }
        return exact.expected();
      }();

      const size_t row = s.dim * bytes, logits = samples * bytes, width = s.key_aware ? row : logits;
      const size_t maps = kItems * a.num_tokens * heads * row;
      void *d_query, *d_key = nullptr, *d_value, *d_references, *d_offsets, *d_output;
      const auto allocate = [](void** data, size_t size) { CHECK(cudaMalloc(data, size) == cudaSuccess, "%zu", size); };
      const auto write = [](void* data, size_t end, const void* source, size_t size) {
        cudaMemcpy(static_cast<char*>(data) + end - size, source, size, cudaMemcpyDefault);
      };
      allocate(&d_query, cells * width);
      allocate(&d_value, maps);
      if (s.own_key) allocate(&d_key, maps);
      allocate(&d_references, kItems * queries * 8 * sizeof(float));
      allocate(&d_offsets, cells * samples * 2 * bytes);
      allocate(&d_output, cells * row);
      const DeviceMemory d_shapes(shapes.data(), shapes.size() * sizeof(int64_t));
      write(d_query, cells * width, problem.query.data(), width);
      write(d_references, kItems * queries * 8 * sizeof(float), problem.references.data(), 8 * sizeof(float));
      write(d_offsets, cells * samples * 2 * bytes, problem.offsets.data(), samples * 2 * bytes);
      for (int64_t token = 0; token < problem.tokens; ++token) {
        /* Of the first level, rows of the large map. */
        const int64_t left = problem.tokens - token + (token < 2 ? side - 2 : 0); /* tokens from here to the end */
        const size_t end = maps - (left - 1) * heads * row;
        write(d_value, end, static_cast<char*>(problem.value.data()) + token * row, row);
        if (s.own_key) write(d_key, end, static_cast<char*>(problem.key.data()) + token * row, row);
      }
      a.query = d_query;
      a.key = d_key;
      a.value = d_value;
      a.reference_points = static_cast<float*>(d_references);
      a.sampling_offsets = d_offsets;
      a.spatial_shapes = d_shapes.data;
      a.output = d_output;
      char message[256] = "";
      CHECK(kda_cuda_forward(&a, nullptr, message, sizeof message) == KDA_OK, "%s", message);
      cudaMemcpy(problem.output.data(), static_cast<char*>(d_output) + cells * row - row, row, cudaMemcpyDefault);
      /* Coordinates of a map of `side` pixels round. */
      const double allowed = tolerance(problem) + largest_value(problem) * 8 * side * 0x1p-24;
      for (size_t i = 0; i < expected.size(); ++i) {
        const double error = fabs(problem.output.get(i) - expected[i]);
        CHECK(error <= allowed, "output %zu: error %g, allowed %g: %s", i, error, allowed, describe(s).c_str());
      }
      for (void* data : {d_query, d_key, d_value, d_references, d_offsets, d_output}) cudaFree(data);
    }
  }
}
#endif

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
  expect("sampling_offsets starts at address 0x1008; it must be a multiple of 16: pass a copy", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) {
           a->num_levels = a->num_points = 4; /* whose kernels load 16 bytes of offsets */
           a->sampling_offsets = reinterpret_cast<void*>(0x1008);
           a->reference_points = reinterpret_cast<float*>(0x1000);
         });
  expect("query has 65535 x 65536 rows of 1 heads; the CUDA kernels take at most 2147483647 heads", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->batch = 65535, a->num_queries = 65536; });
  expect("query has 65536 items; the CUDA kernels take at most 65535", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->batch = 65536; });
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
  test_queries_of_levels(device);
  test_least_alignment(device);
#ifdef KDA_CUDA_EMULATION
  test_stream();
  emulation::only_last_block = true;
  test_large_tensors(int64_t{1} << 23, 8, 2);
  test_large_tensors(int64_t{1} << 28, 1, 2);
  test_large_tensors(1, 8, 1 << 12);
  emulation::only_last_block = false;
#endif
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
