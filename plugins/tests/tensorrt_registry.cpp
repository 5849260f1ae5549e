/* A TensorRT 10 with nothing but a plugin registry, for tensorrt_register: its table of virtual functions is that of
 * the headers, and TensorRT 10 itself does not run where there is no GPU. */
#include <NvInferRuntime.h>
#include <string.h>

#include <vector>

#if NV_TENSORRT_MAJOR != 10
#error "the headers are not those of TensorRT 10"
#endif

namespace {

using nvinfer1::IPluginCreatorInterface;

struct Registry final : nvinfer1::IPluginRegistry {
  std::vector<IPluginCreatorInterface*> creators;

  bool registerCreator(IPluginCreatorInterface& creator, const char* const) noexcept override {
    creators.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(creators.size());
    return creators.data();
  }
  IPluginCreatorInterface* getCreator(const char* const name, const char* const version,
                                      const char* const name_space) noexcept override {
    for (IPluginCreatorInterface* creator : creators) {
      auto* known = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
      if (strcmp(known->getPluginName(), name) == 0 && strcmp(known->getPluginVersion(), version) == 0 &&
          strcmp(known->getPluginNamespace(), name_space) == 0) {
        return creator;
      }
    }
    return nullptr;
  }

  /* The rest is not called. */
  bool registerCreator(nvinfer1::IPluginCreator&, const char* const) noexcept override { __builtin_trap(); }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { __builtin_trap(); }
  nvinfer1::IPluginCreator* getPluginCreator(const char* const, const char* const,
                                             const char* const) noexcept override {
    __builtin_trap();
  }
  void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override { __builtin_trap(); }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { __builtin_trap(); }
  bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override { __builtin_trap(); }
  bool isParentSearchEnabled() const override { __builtin_trap(); }
  void setParentSearchEnabled(const bool) override { __builtin_trap(); }
  PluginLibraryHandle loadLibrary(const char*) noexcept override { __builtin_trap(); }
  void deregisterLibrary(PluginLibraryHandle) noexcept override { __builtin_trap(); }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { __builtin_trap(); }
  nvinfer1::IPluginResource* acquirePluginResource(const char*, nvinfer1::IPluginResource*) noexcept override {
    __builtin_trap();
  }
  int32_t releasePluginResource(const char*) noexcept override { __builtin_trap(); }
#if NV_TENSORRT_MINOR >= 10
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { __builtin_trap(); }
#endif

  /* Asks as the end of a program may. */
  ~Registry() {
    for (IPluginCreatorInterface* creator : creators) {
      if (strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) __builtin_trap();
    }
  }
};

Registry registry;

}  // namespace

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  return &registry;
}
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
