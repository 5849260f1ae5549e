/* The CPU operator against its definition in double precision, on every instruction set of this machine. */
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "cases.h"
#include "cpu_kernel.h"

namespace {

kda_status run_on_cpu(Problem* problem) { return problem->run(); }

/* Few queries of many tokens read the value where it lies: the same as from the workspace, which an equal key of its
 * own makes them use; NaN, Inf and wild locations included. */
void test_in_place(const Device& device) {
  const char* isa = device.name;
  const float wild[] = {1e30f, -INFINITY, INFINITY, NAN, -3e9f};
  for (int dim : {16, 32, 64}) {
    for (int width : {2, 4}) {
      for (int round = 0; round < 12; ++round) {
        Shape s;
        s.batch = 2;
        s.queries = 5;
        s.heads = 3;
        s.dim = dim;
        s.points = 4;
        s.reference_width = width;
        s.levels = {8, 8, 4, 5, 1, 4, 2, 1};
        Problem in_place(s);
        s.own_key = true;
        Problem repacked(s);
        in_place.randomise(round);
        repacked.randomise(round);
        if (round % 3 == 0) check_against_definition(device, &in_place);
        for (size_t i = round % 3; i < in_place.offsets.size() && round % 3; i += 37)
          in_place.offsets.set(i, wild[i % 5]);
        for (size_t i = round; i < in_place.value.size() && round % 3 == 2; i += 7 * dim + 1) {
          in_place.value.set(i, wild[1 + i % 3]);
        }
        repacked.query = in_place.query;
        repacked.offsets = in_place.offsets;
        repacked.references = in_place.references;
        repacked.key = repacked.value = in_place.value;
        CHECK(in_place.run() == KDA_OK && repacked.run() == KDA_OK, "%s", isa);
        for (size_t i = 0; i < in_place.output.size(); ++i) {
          const float got = in_place.output.get(i), wanted = repacked.output.get(i);
          CHECK(got == wanted || (isnan(got) && isnan(wanted)), "%s: %g, not %g, at %d", isa, got, wanted, int(i));
        }
      }
    }
  }
}

struct Threads {
  int64_t grain;
  int count;
  static void run(void* self, int64_t count, kda_task task, void* state) {
    const Threads* threads = static_cast<Threads*>(self);
    std::atomic<int64_t> next{0};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads->count; ++t) {
      pool.emplace_back([&] {
        for (;;) {
          const int64_t begin = next.fetch_add(threads->grain);
          if (begin >= count) return;
          task(begin, std::min(begin + threads->grain, count), state);
        }
      });
    }
    for (std::thread& thread : pool) thread.join();
  }
};

int32_t serial_for(int64_t begin, int64_t end, int64_t grain, kda_task task, void* state) {
  for (int64_t i = begin; i < end; i += grain) task(i, std::min(i + grain, end), state);
  return 0;
}

/* The same rows in other batch items and other chunks give the same bits. */
void test_executors(const char* isa) {
  Shape s;
  s.batch = 2;
  s.queries = 333;
  s.heads = 3;
  s.dim = 32;
  s.points = 4;
  s.levels = {9, 13, 5, 7, 3, 4, 2, 2};
  for (bool own_key : {false, true}) {
    s.own_key = own_key;
    Problem alone(s);
    alone.randomise(13);
    for (Tensor* tensor : {&alone.query, &alone.key, &alone.value, &alone.offsets}) {
      std::copy_n(tensor->floats.begin(), tensor->size() / 2, tensor->floats.begin() + tensor->size() / 2);
    }
    std::copy_n(alone.references.begin(), alone.references.size() / 2,
                alone.references.begin() + alone.references.size() / 2);
    /* ... and the last query repeats the first, in another chunk. */
    const auto repeat = [&](float* data, size_t size) { std::copy_n(data, size, data + (s.queries - 1) * size); };
    repeat(alone.query.floats.data(), s.heads * s.dim);
    repeat(alone.offsets.floats.data(), s.heads * 16 * 2);
    repeat(alone.references.data(), 8);
    alone.run();
    const auto& output = alone.output.floats;
    const size_t half = output.size() / 2, row = s.heads * s.dim;
    CHECK(memcmp(&output[0], &output[(s.queries - 1) * row], row * 4) == 0, "%s: chunks differ", isa);
    CHECK(std::equal(&output[row], &output[(s.queries - 1) * row], &output[half + row]), "%s: items differ", isa);
    for (int count : {1, 2, 5}) {
      for (int64_t grain : {1, 3, 1000}) {
        Problem together = alone;
        std::fill(together.output.floats.begin(), together.output.floats.end(), -1.0f);
        Threads threads = {grain, count};
        const kda_executor executor = {Threads::run, &threads};
        CHECK(together.run(&executor) == KDA_OK, "%s", isa);
        CHECK(together.output.floats == output, "%s: %d threads, grain %d", isa, count, int(grain));
      }
    }
    Problem other = alone;
    const kda_parallel_for function = serial_for;
    kda_executor executor = {kda_run_parallel_for, nullptr};
    memcpy(&executor.self, &function, sizeof function);
    CHECK(other.run(&executor) == KDA_OK && other.output.floats == output, "%s: kda_run_parallel_for", isa);
  }
}

/* Every 16-bit number, subnormals, infinities and NaN included, survives the way through the kernel: plain attention of
 * one point on a pixel copies the token. */
void test_half_round_trip(const char* isa) {
  Shape s;
  s.queries = 64;
  s.dim = 1024;
  s.levels = {1, 64};
  s.key_aware = false;
  for (int32_t dtype : {KDA_FLOAT16, KDA_BFLOAT16}) {
    s.dtype = dtype;
    Problem problem(s);
    for (int i = 0; i < 65536; ++i) problem.value.words[i] = static_cast<uint16_t>(i);
    for (int q = 0; q < 64; ++q) problem.references[2 * q] = (q + 0.5f) / 64, problem.references[2 * q + 1] = 0.5f;
    problem.run();
    for (int i = 0; i < 65536; ++i) {
      const float in = problem.value.get(i), out = problem.output.get(i);
      /* The right neighbour has weight 0, which NaN and Inf survive. */
      const bool neighbour = i + 1024 < 65536 && !isfinite(problem.value.get(i + 1024));
      if (!isfinite(in) || neighbour) {
        CHECK(!isfinite(out), "%s: word %x became %g", isa, i, out);
      } else {
        CHECK(in == out, "%s: word %x: %g became %g", isa, i, in, out);
      }
    }
  }
}

void test_messages() {
  Shape s;
  s.levels = {4, 8};
  Problem problem(s);
  const auto expect = [&](const char* what, kda_status status, void (*change)(kda_arguments*)) {
    kda_arguments a = problem.arguments();
    change(&a);
    char message[256] = "";
    CHECK(kda_cpu_check(&a, message, sizeof message) == status, "%s", message);
    CHECK(strcmp(message, what) == 0, "got  '%s'\n  want '%s'", message, what);
    char forward_message[256] = "";
    char workspace[64];
    CHECK(kda_cpu_forward(&a, workspace, nullptr, forward_message, sizeof forward_message) == status, "%s", what);
    CHECK(strcmp(message, forward_message) == 0, "%s", forward_message);
    char cut[8];
    CHECK(kda_cpu_check(&a, cut, sizeof cut) == status && strlen(cut) == 7, "%s", cut);
    CHECK(kda_cpu_check(&a, nullptr, 0) == status, "%s", what);
  };
  expect("value has 31 tokens; it must have 32, the sum of height * width over spatial_shapes", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->num_tokens = 31; });
  expect("head_dim is 6; the CPU kernels take multiples of 4", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->head_dim = 6; });
  expect("num_points is 9; the kernels take at most 8", KDA_UNSUPPORTED, [](kda_arguments* a) { a->num_points = 9; });
  expect("spatial_shapes has 9 levels; the kernels take at most 8", KDA_UNSUPPORTED,
         [](kda_arguments* a) { a->num_levels = 9; });
  expect("reference_points has a last dimension of 3; it must be 2 (x, y) or 4 (x, y, w, h)", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->reference_width = 3; });
  expect(
      "sampling_offsets is float16 where value is float32; it must be float32 or the type of value: cast the offsets "
      "to float32, or export the model again",
      KDA_INVALID_ARGUMENT, [](kda_arguments* a) { a->offset_dtype = KDA_FLOAT16; });
  expect("value has dtype 7; it must be 0 (float32), 1 (float16) or 2 (bfloat16)", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->dtype = 7; });
  expect("query has -1 queries; it must have at least 0", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->num_queries = -1; });
  expect("query is NULL; it must point to the tensor's data", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->query = nullptr; });
  expect("attention_logits is NULL; it must point to the tensor's data", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->key_aware = 0, a->query = nullptr; });
  expect("spatial_shapes is NULL; it must point to [1, 2] int64", KDA_INVALID_ARGUMENT,
         [](kda_arguments* a) { a->spatial_shapes = nullptr; });
  problem.shape.levels[0] = 0;
  expect("spatial_shapes has (0, 8) at level 0; both must be at least 1", KDA_INVALID_ARGUMENT, [](kda_arguments*) {});
  problem.shape.levels[0] = 4;
  const kda_arguments a = problem.arguments();
  char message[256] = "";
  CHECK(kda_cpu_forward(&a, nullptr, nullptr, message, sizeof message) == KDA_INVALID_ARGUMENT, "%s", message);
  CHECK(strncmp(message, "workspace is NULL; it must have ", 32) == 0, "%s", message);
}

/* The backward pass against central differences of the definition.  Every sample lies a quarter of a pixel from the
 * next pixel's border, where the output has a kink. */
void check_backward(const char* isa, Shape s) {
  constexpr float kStep = 0x1p-10f;
  Problem problem(s);
  problem.randomise(9);
  std::mt19937 random(10);
  for (size_t i = 0; i < problem.references.size(); ++i) {
    const float side = s.levels[i / s.reference_width % problem.levels * 2 + 1 - i % 2];
    const bool box = i % s.reference_width >= 2;
    problem.references[i] = box ? 2 * s.points / side : (random() % int(side) + 0.5f) / side;
  }
  for (float& offset : problem.offsets.floats) offset = std::round(2 * offset) / 2 + 0.25f;
  Tensor output(KDA_FLOAT32, problem.output.size());
  Problem::fill(&output, 1, &random);
  std::vector<float> query(problem.query.size()), key(problem.key.size()), value(problem.value.size()),
      references(problem.references.size()), offsets(problem.offsets.size());
  const kda_gradients gradients = {output.floats.data(), query.data(),      key.data(),
                                   value.data(),         references.data(), offsets.data()};
  const kda_arguments a = problem.arguments();
  CHECK(kda_cpu_backward(&a, &gradients, nullptr, nullptr, 0) == KDA_OK, "%s", describe(s).c_str());

  const auto loss = [&] {
    const std::vector<double> expected = problem.expected();
    double sum = 0;
    for (size_t i = 0; i < expected.size(); ++i) sum += expected[i] * output.get(i);
    return sum;
  };
  const auto check = [&](const char* name, std::vector<float>* input, const std::vector<float>& gradient) {
    double largest = 0, worst = 0;
    for (size_t i = random() % 3; i < input->size(); i += 1 + input->size() / 40) {
      const float centre = (*input)[i], step = kStep;
      (*input)[i] = centre + step;
      const double above = loss(), high = (*input)[i];
      (*input)[i] = centre - step;
      const double slope = (above - loss()) / (high - (*input)[i]);
      (*input)[i] = centre;
      largest = fmax(largest, fabs(slope));
      worst = fmax(worst, fabs(slope - gradient[i]));
    }
    CHECK(worst <= 1e-4 * largest + 1e-5, "%s: %s: error %g of %g: %s", isa, name, worst, largest, describe(s).c_str());
  };
  check("query", &problem.query.floats, query);
  check("key", &problem.key.floats, key);
  check("value", &problem.value.floats, value);
  check("reference_points", &problem.references, references);
  check("sampling_offsets", &problem.offsets.floats, offsets);
}

void test_backward(const char* isa) {
  for (int dim : {4, 12, 32}) {
    for (int key = 0; key < 3; ++key) {
      for (int width = 2; width <= 4; width += 2) {
        Shape s;
        s.batch = 2;
        s.queries = 3;
        s.heads = 2;
        s.dim = dim;
        s.points = dim == 32 ? 4 : 2;
        s.levels = {4, 8, 2, 4, 2, 2, 1, 1};
        s.reference_width = width;
        s.key_aware = key > 0;
        s.own_key = key == 2;
        check_backward(isa, s);
      }
    }
  }
  Problem half({1, 1, 1, 4, 1, 2, {1, 1}, true, false, KDA_FLOAT16, KDA_FLOAT16});
  const kda_arguments a = half.arguments();
  float any[8];
  const kda_gradients gradients = {any, any, nullptr, any, nullptr, any};
  char message[256];
  CHECK(kda_cpu_backward(&a, &gradients, nullptr, message, sizeof message) == KDA_UNSUPPORTED, "%s", message);
  CHECK(strcmp(message, "value has dtype 1; the CPU backward pass takes 0 (float32)") == 0, "%s", message);
}

}  // namespace

int main() {
  CHECK(kda_abi_version() == KDA_ABI_VERSION, "%d", kda_abi_version());
  test_messages();
  for (const char* isa : {"generic", "neon", "avx2", "avx512"}) {
    if (!kda::select_isa(isa)) continue;
    CHECK(strcmp(kda_cpu_isa(), isa) == 0, "%s", kda_cpu_isa());
    const Device device = {isa, 4, 96, run_on_cpu};
    test_cases(device, 120);
    test_in_place(device);
    test_executors(isa);
    test_half_round_trip(isa);
    test_backward(isa);
    printf("%s: done\n", isa);
  }
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
