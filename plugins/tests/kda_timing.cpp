/* Times the CPU operator on the shapes of Lite-DINO R50 at 800x1333 and 640x640, every instruction set in turn:
 *   kda_timing [threads] [rounds] [dtype]
 * Prints minimum and median in milliseconds.  The product's benchmark, with its rivals, is benchmarks/kernels.py. */
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "cpu_kernel.h"
#include "problem.h"

namespace {

/* Queries are the tokens of the levels from `first_query_level` on, at their centres, and each head looks in a
 * direction of its own, further with every point, as Deformable DETR initialises it; or boxes at random. */
Problem make_problem(const std::vector<int64_t>& levels, int first_query_level, int64_t boxes, int32_t dtype) {
  Shape s;
  s.heads = 8;
  s.dim = 32;
  s.points = 4;
  s.levels = levels;
  s.dtype = s.offset_dtype = dtype;
  s.reference_width = boxes ? 4 : 2;
  s.queries = boxes;
  for (size_t l = first_query_level; l < levels.size() / 2 && !boxes; ++l)
    s.queries += levels[2 * l] * levels[2 * l + 1];
  Problem problem(s);
  problem.randomise(1);
  std::mt19937 random(2);
  float* reference = problem.references.data();
  if (boxes) {
    std::uniform_real_distribution<float> place(0, 1);
    std::lognormal_distribution<float> side(logf(0.15f), 0.8f);
    for (int64_t q = 0; q < boxes; ++q) {
      const float box[4] = {place(random), place(random), side(random), side(random)};
      for (int l = 0; l < 4; ++l) reference = std::copy_n(box, 4, reference);
    }
  } else {
    for (size_t l = first_query_level; l < levels.size() / 2; ++l) {
      for (int64_t y = 0; y < levels[2 * l]; ++y) {
        for (int64_t x = 0; x < levels[2 * l + 1]; ++x) {
          for (int i = 0; i < 4; ++i) {
            *reference++ = (x + 0.5f) / levels[2 * l + 1];
            *reference++ = (y + 0.5f) / levels[2 * l];
          }
        }
      }
    }
  }
  std::normal_distribution<float> normal(0, boxes ? 1.0f : 2.0f);
  for (size_t i = 0; i < problem.offsets.size(); i += 2) {
    const size_t head = i / 32 % 8, point = i / 2 % 4;
    const double angle = head * 2 * M_PI / 8;
    problem.offsets.set(i, static_cast<float>(cos(angle) * (point + 1)) + normal(random));
    problem.offsets.set(i + 1, static_cast<float>(sin(angle) * (point + 1)) + normal(random));
  }
  return problem;
}

/* Threads that wait between calls, and take task after task, as ONNX Runtime's do. */
class Pool {
 public:
  explicit Pool(int count) {
    for (int t = 1; t < count; ++t) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  static void run(void* self, int64_t count, kda_task task, void* state) {
    static_cast<Pool*>(self)->run(count, task, state);
  }

 private:
  void run(int64_t count, kda_task task, void* state) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task, state_ = state, count_ = count, next_ = 0, busy_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    take();
    while (busy_ != 0) std::this_thread::yield();
  }
  void take() {
    for (int64_t i; (i = next_++) < count_;) task_(i, i + 1, state_);
  }
  void work() {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
      }
      take();
      --busy_;
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  int64_t generation_ = 0, count_ = 0;
  kda_task task_ = nullptr;
  void* state_ = nullptr;
  bool stop_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 1;
  const int rounds = argc > 2 ? atoi(argv[2]) : 15;
  const int32_t dtype = argc > 3 ? atoi(argv[3]) : KDA_FLOAT32;
  const std::vector<int64_t> at800 = {100, 167, 50, 84, 25, 42, 13, 21}, at640 = {80, 80, 40, 40, 20, 20, 10, 10};
  struct Case {
    const char* name;
    const std::vector<int64_t>& levels;
    int first_query_level;
    int64_t boxes;
  };
  const Case cases[] = {{"full800", at800, 0, 0}, {"high800", at800, 1, 0}, {"dec800", at800, 0, 900},
                        {"full640", at640, 0, 0}, {"high640", at640, 1, 0}, {"dec640", at640, 0, 900}};
  Pool pool(threads);
  const kda_executor executor = {Pool::run, &pool};
  for (const Case& c : cases) {
    Problem problem = make_problem(c.levels, c.first_query_level, c.boxes, dtype);
    const kda_arguments a = problem.arguments();
    std::vector<const char*> isas;
    for (const char* isa : {"generic", "neon", "avx2", "avx512"}) {
      if (kda::select_isa(isa)) isas.push_back(isa);
    }
    std::vector<std::vector<double>> times(isas.size());
    std::unique_ptr<void, void (*)(void*)> workspace(aligned_alloc(64, (kda_cpu_workspace_size(&a) + 63) / 64 * 64),
                                                     free);
    for (int round = -1; round < rounds; ++round) {
      for (size_t i = 0; i < isas.size(); ++i) {
        kda::select_isa(isas[i]);
        const auto start = std::chrono::steady_clock::now();
        kda_cpu_forward(&a, workspace.get(), threads > 1 ? &executor : nullptr, nullptr, 0);
        const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
        if (round >= 0) times[i].push_back(time.count());
      }
    }
    printf("%s", c.name);
    for (size_t i = 0; i < isas.size(); ++i) {
      std::sort(times[i].begin(), times[i].end());
      printf("  %s %.2f (median %.2f)", isas[i], times[i][0], times[i][times[i].size() / 2]);
    }
    printf("\n");
    fflush(stdout);
  }
  return 0;
}
