/* Opens the registering library as Triton and DeepStream do, in a process of its own for each case:
 *
 *   tensorrt_register REGISTER PLUGINS [TENSORRT...]
 *
 * TENSORRT: libraries with a plugin registry, of TensorRT 11 or tensorrt_registry. */
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

#include "checks.h"

/* nvinfer1::IPluginRegistry as the headers of TensorRT 11 have it; those at hand may be older.  Not in the
 * anonymous namespace: a compiler sees there that nothing implements it, and calls the pure functions. */
struct Registry11 {
  virtual ~Registry11() = default;
  virtual void setErrorRecorder(void*) = 0;
  virtual void* getErrorRecorder() const = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool) = 0;
  virtual void* loadLibrary(const char* path) = 0;
  virtual void deregisterLibrary(void* handle) = 0;
  virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, const char* name_space) = 0;
  virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const = 0;
  virtual nvinfer1::IPluginCreatorInterface* getCreator(const char* name, const char* version,
                                                        const char* name_space) = 0;
};

namespace {

using nvinfer1::IPluginCreatorInterface;

const char *register_library, *plugin_library;
constexpr const char* kOps[] = {"KeyAwareDeformAttn", "MSDeformAttn"};

void* open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  CHECK(library, "%s", dlerror());
  return library;
}

template <typename Function>
Function find(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

struct TensorRT {
  explicit TensorRT(const char* path) : library(open(path)) {
    registry = find<void* (*)()>(library, "getPluginRegistry")();
    is_11 = find<int32_t (*)()>(library, "getInferLibVersion")() >= 110000;
  }
  Registry11* registry11() const { return static_cast<Registry11*>(registry); }

  /* How many creators of an op there are, each of which makes a plugin. */
  int count(const char* op) const {
    int32_t all = 0, found = 0;
    IPluginCreatorInterface* const* creators =
        is_11 ? registry11()->getAllCreators(&all)
              : static_cast<nvinfer1::IPluginRegistry*>(registry)->getAllCreators(&all);
    for (int32_t i = 0; i < all; ++i) {
      if (strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
      auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
      if (strcmp(creator->getPluginName(), op) != 0) continue;
      ++found;
      const int32_t number = 4;
      const nvinfer1::PluginField list[] = {{"num_heads", &number, nvinfer1::PluginFieldType::kINT32, 1},
                                            {"num_points", &number, nvinfer1::PluginFieldType::kINT32, 1}};
      const nvinfer1::PluginFieldCollection fields = {2, list};
      nvinfer1::IPluginV3* plugin = creator->createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD);
      CHECK(plugin, "%s", op);
      delete plugin;
    }
    return found;
  }
  void expect(int wanted, const char* when) const {
    for (const char* op : kOps) CHECK(count(op) == wanted, "%s: %d creators of %s", when, count(op), op);
  }

  void *library, *registry;
  bool is_11;
};

/* Says how many checks failed, and nothing of a crash is lost. */
void in_a_process(const std::string& name, const std::function<void()>& test) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    failures = 0;
    test();
    exit(failures ? 1 : 0); /* with the destructors of everything that was loaded */
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: status %d", name.c_str(), status);
  printf("%s: done\n", name.c_str());
}

bool is_loaded(const char* path) { return dlopen(path, RTLD_NOW | RTLD_NOLOAD) != nullptr; }

void test_without_tensorrt() {
  void* library = open(register_library);
  CHECK(!is_loaded(plugin_library), "the plugins were loaded for nothing");
  CHECK(dlclose(library) == 0 && !is_loaded(register_library), "it stays");
}

void test_opened_twice(const char* path) {
  const TensorRT tensorrt(path);
  tensorrt.expect(0, "before");
  void* first = open(register_library);
  tensorrt.expect(1, "opened");
  void* second = open(register_library);
  tensorrt.expect(1, "opened twice");
  dlclose(first), dlclose(second);
  CHECK(!is_loaded(register_library), "it stays");
  tensorrt.expect(1, "closed"); /* the creators outlive it */
  open(register_library);
  tensorrt.expect(1, "opened again");
}

void test_opened_before(const char* path) {
  void* library = open(register_library);
  const TensorRT tensorrt(path);
  tensorrt.expect(0, "TensorRT came later");
  dlclose(library);
  open(register_library);
  tensorrt.expect(1, "opened again");
}

void test_tensorrt_unloaded(const char* path) {
  const TensorRT tensorrt(path);
  open(register_library);
  dlclose(tensorrt.library);
  TensorRT(path).expect(1, "TensorRT was closed and opened");
}

void test_load_library_before(const char* path) {
  const TensorRT tensorrt(path);
  if (!tensorrt.is_11) return;
  CHECK(tensorrt.registry11()->loadLibrary(plugin_library), "loadLibrary");
  tensorrt.expect(1, "loadLibrary");
  open(register_library);
  tensorrt.expect(1, "both");
}

void test_load_library_after(const char* path) {
  const TensorRT tensorrt(path);
  if (!tensorrt.is_11) return;
  open(register_library);
  /* TensorRT refuses what is there already. */
  CHECK(!tensorrt.registry11()->loadLibrary(plugin_library), "loadLibrary");
  tensorrt.expect(1, "both");
}

void test_several(const std::vector<const char*>& paths) {
  std::vector<TensorRT> all(paths.begin(), paths.end());
  open(register_library);
  for (const TensorRT& tensorrt : all) tensorrt.expect(1, "each");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s REGISTER PLUGINS [TENSORRT...]\n", argv[0]);
    return 2;
  }
  register_library = argv[1], plugin_library = argv[2];
  const std::vector<const char*> tensorrts(argv + 3, argv + argc);
  in_a_process("without TensorRT", test_without_tensorrt);
  for (const char* path : tensorrts) {
    const auto run = [&](const char* name, void (*test)(const char*)) {
      in_a_process(std::string(name) + ", " + path, [&] { test(path); });
    };
    run("opened twice", test_opened_twice);
    run("opened before TensorRT", test_opened_before);
    run("TensorRT unloaded", test_tensorrt_unloaded);
    run("after loadLibrary", test_load_library_before);
    run("before loadLibrary", test_load_library_after);
  }
  in_a_process("several registries", [&] { test_several(tensorrts); });
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
