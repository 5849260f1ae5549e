/* The CUDA operator against its definition in double precision:
 *   kda_cuda_test [rounds of the sweep]
 * Compiled with the CUDA toolkit it needs a device, and exits with 77 where there is none; compiled with the headers in
 * cuda_emulation it runs the same kernels on the host. */
#include <cuda_runtime.h>
#include <stdlib.h>

#include "checks.h"

namespace {

constexpr int kSkipped = 77;
constexpr int32_t kDtypes[] = {KDA_FLOAT32, KDA_FLOAT16, KDA_BFLOAT16};

/* Device memory of exactly the size of a tensor, so that AddressSanitizer and compute-sanitizer see a wrong address. */
class DeviceMemory {
 public:
  DeviceMemory(const void *source, size_t bytes) {
    if (bytes == 0) return;
    CHECK(cudaMalloc(&data, bytes) == cudaSuccess, "%zu bytes", bytes);
    if (source) CHECK(cudaMemcpy(data, source, bytes, cudaMemcpyDefault) == cudaSuccess, "%zu bytes", bytes);
    if (!source) CHECK(cudaMemset(data, 0xff, bytes) == cudaSuccess, "%zu bytes", bytes); /* NaN */
  }
  DeviceMemory(const DeviceMemory &) = delete;
  ~DeviceMemory() { cudaFree(data); }
  void *data = nullptr;
};

size_t bytes_of(const Tensor &tensor) { return tensor.size() * (tensor.dtype == KDA_FLOAT32 ? 4 : 2); }

kda_status run(Problem *problem) {
  const DeviceMemory query(problem->query.data(), bytes_of(problem->query));
  const DeviceMemory key(problem->key.data(), bytes_of(problem->key));
  const DeviceMemory value(problem->value.data(), bytes_of(problem->value));
  const DeviceMemory references(problem->references.data(), problem->references.size() * sizeof(float));
  const DeviceMemory offsets(problem->offsets.data(), bytes_of(problem->offsets));
  const DeviceMemory shapes(problem->shape.levels.data(), problem->shape.levels.size() * sizeof(int64_t));
  const DeviceMemory output(nullptr, bytes_of(problem->output));
  kda_arguments a = problem->arguments();
  a.query = query.data;
  a.key = key.data;
  a.value = value.data;
  a.reference_points = static_cast<float *>(references.data);
  a.sampling_offsets = offsets.data;
  a.spatial_shapes = static_cast<int64_t *>(shapes.data);
  a.output = output.data;
  char message[256] = "";
  const kda_status status = kda_cuda_forward(&a, nullptr, message, sizeof message);
  CHECK(status == KDA_OK, "%s: %s", message, describe(problem->shape).c_str());
  const cudaError_t error = cudaDeviceSynchronize();
  CHECK(error == cudaSuccess, "%s: %s", cudaGetErrorString(error), describe(problem->shape).c_str());
  if (bytes_of(problem->output)) {
    cudaMemcpy(problem->output.data(), output.data, bytes_of(problem->output), cudaMemcpyDefault);
  }
  return status;
}

void check_against_definition(Problem *problem) {
  if (run(problem) != KDA_OK) return;
  const std::vector<double> expected = problem->expected();
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = fabs(problem->output.get(i) - expected[i]);
    worst = error <= worst ? worst : error; /* keeps a NaN */
  }
  const double allowed = tolerance(*problem);
  CHECK(worst <= allowed, "error %g, allowed %g: %s", worst, allowed, describe(problem->shape).c_str());
}

/* A third of the rounds are of four levels of four points and heads of 32 or 64, which have kernels of their own. */
void test_sweep(int rounds) {
  std::mt19937 random(1);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int round = 0; round < rounds; ++round) {
    const bool usual = round % 3 == 0;
    Shape s;
    s.batch = pick(1, 3);
    s.queries = pick(1, 40);
    s.heads = pick(1, 4);
    s.dim = usual ? 32 * pick(1, 2) : 8 * pick(1, 16);
    if (round % 5 == 1) s.dim = 32;
    s.points = usual ? 4 : pick(1, KDA_MAX_POINTS);
    s.reference_width = 2 * pick(1, 2);
    s.levels.clear();
    const int levels = usual ? 4 : pick(1, KDA_MAX_LEVELS);
    for (int i = 0; i < 2 * levels; ++i) s.levels.push_back(pick(0, 4) ? pick(2, 12) : 1);
    s.key_aware = pick(0, 3) != 0;
    s.own_key = s.key_aware && pick(0, 2) == 0;
    s.dtype = kDtypes[pick(0, 2)];
    s.offset_dtype = pick(0, 1) ? s.dtype : KDA_FLOAT32;
    Problem problem(s);
    problem.randomise(round);
    check_against_definition(&problem);
  }
}

/* Several blocks for each head, and maps as wide as those of real images. */
void test_wide_maps() {
  for (int width = 2; width <= 4; width += 2) {
    Shape s;
    s.queries = 80;
    s.heads = 2;
    s.dim = 32;
    s.points = 4;
    s.levels = {20, 167, 10, 84, 5, 42, 3, 21};
    s.reference_width = width;
    Problem problem(s);
    problem.randomise(7);
    check_against_definition(&problem);
  }
}

void test_most_samples() {
  for (int dim : {8, 128}) {
    for (bool key_aware : {false, true}) {
      Shape s;
      s.queries = 40;
      s.dim = dim;
      s.points = KDA_MAX_POINTS;
      s.levels = {4, 4, 3, 5, 2, 2, 1, 1, 1, 3, 2, 1, 5, 1, 2, 3};
      s.key_aware = key_aware;
      s.dtype = KDA_FLOAT16;
      Problem problem(s);
      problem.randomise(9);
      check_against_definition(&problem);
    }
  }
}

void test_empty() {
  for (int which = 0; which < 2; ++which) {
    Shape s;
    s.dim = 8;
    s.batch = which;
    s.queries = which ? 0 : 5;
    Problem problem(s);
    CHECK(run(&problem) == KDA_OK, "%s", describe(s).c_str());
  }
}

/* One head, one level, one point: the output is the sample itself, whatever the logit.  Sizes are powers of two, so
 * that coordinates are exact. */
Problem single_point(float pixel_x, float pixel_y, int64_t height, int64_t width, int32_t dim, int32_t dtype) {
  Shape s;
  s.dim = dim;
  s.levels = {height, width};
  s.dtype = dtype;
  Problem problem(s);
  problem.randomise(3);
  problem.references = {0.5f / width, 0.5f / height}; /* pixel (0, 0) */
  problem.offsets.set(0, pixel_x);
  problem.offsets.set(1, pixel_y);
  return problem;
}

void test_borders() {
  for (int64_t width : {1, 8}) {
    for (int64_t height : {1, 4}) {
      for (float y : {-2.0f, -1.0f, -0.5f, 0.0f, 0.25f, height - 1.0f, height - 0.5f, float(height), height + 3.0f}) {
        for (float x : {-2.0f, -1.0f, -0.5f, 0.0f, 0.75f, width - 1.0f, width - 0.5f, float(width), width + 3.0f}) {
          Problem problem = single_point(x, y, height, width, 32, KDA_FLOAT32);
          check_against_definition(&problem);
        }
      }
    }
  }
}

/* A token of NaN or Inf reaches exactly the samples that it is a corner of inside the map, zero weight included. */
void test_non_finite_values() {
  const int64_t height = 4, width = 8;
  for (int32_t dtype : {KDA_FLOAT32, KDA_FLOAT16}) {
    for (int64_t token : {int64_t{0}, width + 3, height * width - 1}) {
      const float poison = token ? NAN : INFINITY;
      const int64_t tx = token % width, ty = token / width;
      for (float y = ty - 1.5f; y <= ty + 1.5f; y += 0.5f) {
        for (float x = tx - 1.5f; x <= tx + 1.5f; x += 0.5f) {
          Problem problem = single_point(x, y, height, width, 32, dtype);
          for (int d = 0; d < 32; ++d) problem.value.set(token * 32 + d, poison);
          run(&problem);
          const bool touched = tx >= floorf(x) && tx <= floorf(x) + 1 && ty >= floorf(y) && ty <= floorf(y) + 1;
          const std::vector<double> expected = problem.expected();
          for (int d = 0; d < 32; ++d) {
            const float got = problem.output.get(d);
            /* A logit of Inf or NaN makes the softmax NaN, so every touched output is NaN. */
            CHECK(isnan(got) == touched, "%g at (%g, %g), token %d", got, x, y, int(token));
            if (!touched) CHECK(fabs(got - expected[d]) <= tolerance(problem), "%g, not %g", got, expected[d]);
          }
        }
      }
    }
  }
  /* Where the logits are given, channels do not meet. */
  Problem problem = single_point(2.5f, 1.5f, height, width, 32, KDA_FLOAT32);
  problem.shape.key_aware = false;
  problem.query = Tensor(KDA_FLOAT32, 1);
  problem.value.set((2 * width + 3) * 32 + 5, INFINITY);
  run(&problem);
  for (int d = 0; d < 32; ++d) CHECK(isinf(problem.output.get(d)) == (d == 5), "channel %d", d);
}

/* Locations far away, infinite or NaN lie outside: zero, and nothing is read out of bounds. */
void test_wild_locations() {
  for (float wild : {1e6f, 3e9f, 1e19f, 3e38f, INFINITY, NAN}) {
    for (float sign : {-1.0f, 1.0f}) {
      for (int where = 0; where < 4; ++where) {
        Problem problem = single_point(0, 0, 4, 8, 32, KDA_FLOAT32);
        if (where < 2) {
          problem.offsets.set(where, sign * wild);
        } else {
          problem.references[where - 2] = sign * wild;
        }
        run(&problem);
        for (int d = 0; d < 32; ++d) CHECK(problem.output.get(d) == 0, "%g", sign * wild);
      }
    }
  }
  /* Infinite boxes, as inverse sigmoids of invalid proposals make them, among four levels of four points. */
  Shape s;
  s.queries = 9;
  s.dim = 32;
  s.points = 4;
  s.reference_width = 4;
  s.levels = {8, 8, 4, 4, 2, 2, 1, 1};
  Problem problem(s);
  problem.randomise(5);
  for (size_t i = 0; i < problem.references.size(); ++i) {
    if (i % 3) problem.references[i] = i % 2 ? INFINITY : NAN;
  }
  run(&problem);
  for (size_t i = 0; i < problem.output.size(); ++i) CHECK(isfinite(problem.output.get(i)), "output %zu", i);
}

/* The host does not see the shapes: wrong ones give wrong numbers, but nothing is read that is not there. */
void test_wrong_spatial_shapes() {
  for (int64_t wrong : {int64_t{-3}, int64_t{0}, int64_t{9}, (int64_t{1} << 32) + 100, INT64_MAX}) {
    for (int where = 0; where < 4; ++where) {
      Shape s;
      s.queries = 20;
      s.dim = 16;
      s.levels = {8, 8, 4, 4};
      Problem problem(s);
      problem.randomise(5);
      problem.shape.levels[where] = wrong;
      run(&problem);
      for (size_t i = 0; i < problem.output.size(); ++i) CHECK(isfinite(problem.output.get(i)), "output %zu", i);
    }
  }
}

/* A logit of minus infinity takes no part; logits far apart do not overflow. */
void test_extreme_logits() {
  Shape s;
  s.dim = 32;
  s.points = 4;
  s.levels = {8, 8, 4, 4, 2, 2, 1, 1};
  s.key_aware = false;
  Problem problem(s);
  problem.randomise(11);
  for (int p = 0; p < 16; ++p) problem.query.set(p, p % 3 == 0 ? -INFINITY : p % 3 == 1 ? 3e38f : -3e38f);
  check_against_definition(&problem);
  for (int p = 0; p < 16; ++p) problem.query.set(p, -INFINITY);
  run(&problem);
  for (int d = 0; d < 32; ++d) CHECK(isnan(problem.output.get(d)), "%g", problem.output.get(d));

  /* The same from the key: tokens of the first level, all but one, make logits of minus infinity. */
  s.key_aware = s.own_key = true;
  s.reference_width = 2;
  Problem keyed(s);
  keyed.randomise(12);
  for (int d = 0; d < 32; ++d) keyed.query.set(d, d == 0);
  for (int64_t token = 0; token < 64; ++token) keyed.key.set(token * 32, -INFINITY);
  for (int i = 0; i < 8; ++i) keyed.references[i] = 0.5f;
  for (int i = 0; i < 32; ++i) keyed.offsets.set(i, 0.25f);
  run(&keyed);
  const std::vector<double> expected = keyed.expected();
  for (int d = 0; d < 32; ++d) {
    CHECK(fabs(keyed.output.get(d) - expected[d]) <= tolerance(keyed), "%g, not %g", keyed.output.get(d), expected[d]);
  }
}

/* The same rows in other batch items and other blocks give the same bits, and so does a second run. */
void test_identical_rows() {
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
    const auto repeat = [](Tensor *tensor, size_t target, size_t count) {
      for (size_t i = 0; i < count; ++i) tensor->set(target + i, tensor->get(i));
    };
    /* The last query of an item repeats the first ... */
    const size_t row = s.heads * s.dim, offsets = s.heads * 16 * 2, references = 4 * 2;
    repeat(&problem.query, (s.queries - 1) * row, row);
    repeat(&problem.offsets, (s.queries - 1) * offsets, offsets);
    std::copy_n(problem.references.begin(), references, problem.references.begin() + (s.queries - 1) * references);
    /* ... and the second item the first item. */
    for (Tensor *tensor : {&problem.query, &problem.value, &problem.offsets}) {
      repeat(tensor, tensor->size() / 2, tensor->size() / 2);
    }
    const size_t half = problem.references.size() / 2;
    std::copy_n(problem.references.begin(), half, problem.references.begin() + half);
    check_against_definition(&problem);
    Problem again = problem;
    run(&again);
    const Tensor &output = problem.output;
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
  const auto expect = [&](const char *what, kda_status status, void (*change)(kda_arguments *)) {
    kda_arguments a = problem.arguments();
    /* Never followed: the checks come first. */
    a.query = a.value = a.sampling_offsets = a.output = reinterpret_cast<void *>(0x1000);
    change(&a);
    char message[256] = "", forward_message[256] = "";
    CHECK(kda_cuda_check(&a, message, sizeof message) == status, "%s", message);
    CHECK(strcmp(message, what) == 0, "got  '%s'\n  want '%s'", message, what);
    CHECK(kda_cuda_forward(&a, nullptr, forward_message, sizeof forward_message) == status, "%s", what);
    CHECK(strcmp(message, forward_message) == 0, "%s", forward_message);
    CHECK(kda_cuda_check(&a, nullptr, 0) == status, "%s", what);
  };
  expect("head_dim is 12; the CUDA kernels take multiples of 8", KDA_UNSUPPORTED,
         [](kda_arguments *a) { a->head_dim = 12; });
  expect("head_dim is 136; the CUDA kernels take at most 128", KDA_UNSUPPORTED,
         [](kda_arguments *a) { a->head_dim = 136; });
  expect("num_points is 9; the kernels take at most 8", KDA_UNSUPPORTED, [](kda_arguments *a) { a->num_points = 9; });
  expect("spatial_shapes has 9 levels; the kernels take at most 8", KDA_UNSUPPORTED,
         [](kda_arguments *a) { a->num_levels = 9; });
  expect("reference_points has a last dimension of 3; it must be 2 (x, y) or 4 (x, y, w, h)", KDA_INVALID_ARGUMENT,
         [](kda_arguments *a) { a->reference_width = 3; });
  expect("sampling_offsets has dtype 1 (float16); it must be float32 or the dtype of value, float32",
         KDA_INVALID_ARGUMENT, [](kda_arguments *a) { a->offset_dtype = KDA_FLOAT16; });
  expect("query is NULL; it must point to the tensor's data", KDA_INVALID_ARGUMENT,
         [](kda_arguments *a) { a->query = nullptr; });
  expect("value starts at address 0x1008; it must be a multiple of 16: pass a copy", KDA_INVALID_ARGUMENT,
         [](kda_arguments *a) { a->value = reinterpret_cast<void *>(0x1008); });
  expect("sampling_offsets starts at address 0x1004; it must be a multiple of 8: pass a copy", KDA_INVALID_ARGUMENT,
         [](kda_arguments *a) { a->sampling_offsets = reinterpret_cast<void *>(0x1004); });
  expect("query has 65536 x 65536 rows of 1 heads; the CUDA kernels take at most 2147483647 heads", KDA_UNSUPPORTED,
         [](kda_arguments *a) { a->batch = a->num_queries = 65536; });
}

}  // namespace

int main(int argc, char **argv) {
  test_messages();
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf(failures ? "%d checks failed\n" : "no CUDA device: only the messages were checked\n", failures);
    return failures ? 1 : kSkipped;
  }
  test_sweep(argc > 1 ? atoi(argv[1]) : 60);
  test_wide_maps();
  test_most_samples();
  test_empty();
  test_borders();
  test_non_finite_values();
  test_wild_locations();
  test_wrong_spatial_shapes();
  test_extreme_logits();
  test_identical_rows();
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
