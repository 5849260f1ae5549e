/* Registers the plugins with the TensorRT of the process when it is opened: for programs that open a library with
 * dlopen and call nothing in it, as Triton's TensorRT back end and DeepStream do.
 *
 * The plugins are in the library beside this one, which is opened only if there is a TensorRT.  Where there is none
 * yet, nothing happens, and nothing will when TensorRT is loaded later: open this library after it, or preload both.
 */
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

using nvinfer1::IPluginCreatorInterface;

constexpr const char* kPlugins = "liblitedetr_tensorrt.so";

__attribute__((format(printf, 1, 2))) void complain(const char* format, ...) {
  char text[640];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  fprintf(stderr, "liblitedetr_tensorrt_register.so: %s\n", text);
}

/* A registry is reached through its table of virtual functions, and not through the header's class: TensorRT 11 took
 * the functions of older creators out of the table, and one library serves both. */
struct Slots {
  size_t register_creator, get_creator;
};
constexpr Slots kSlots10 = {12, 14}, kSlots11 = {8, 10};

class Registry {
 public:
  Registry(void* registry, const Slots& slots) : registry_(registry), slots_(slots) {}

  bool has(const char* name, const char* version, const char* name_space) const {
    return call<IPluginCreatorInterface*>(slots_.get_creator, name, version, name_space) != nullptr;
  }
  bool add(IPluginCreatorInterface* creator, const char* name_space) const {
    return call<bool>(slots_.register_creator, creator, name_space);
  }

 private:
  template <typename Result, typename... Arguments>
  Result call(size_t slot, Arguments... arguments) const {
    using Function = Result (*)(void*, Arguments...);
    return (*static_cast<Function* const*>(registry_))[slot](registry_, arguments...);
  }

  void* const registry_;
  const Slots slots_;
};

/* The function, or NULL where the object has it from another one. */
template <typename Function>
Function own_function(void* object, const char* name) {
  void* address = dlsym(object, name);
  Dl_info info;
  link_map *home = nullptr, *map = nullptr;
  if (!address || !dladdr1(address, &info, reinterpret_cast<void**>(&home), RTLD_DL_LINKMAP) ||
      dlinfo(object, RTLD_DI_LINKMAP, &map) != 0 || home != map) {
    return nullptr;
  }
  return reinterpret_cast<Function>(address);
}

using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);

/* Of the library beside this one, which stays open: a registry holds its creators to the end of the program. */
GetCreators open_plugins() {
  Dl_info info;
  char path[4096];
  if (!dladdr(reinterpret_cast<const void*>(kPlugins), &info)) return nullptr;
  const char* slash = strrchr(info.dli_fname, '/');
  const int folder = slash ? static_cast<int>(slash + 1 - info.dli_fname) : 0;
  snprintf(path, sizeof path, "%.*s%s", folder, info.dli_fname, kPlugins);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* function = library ? dlsym(library, "getCreators") : nullptr;
  if (!function) complain("the plugins are not registered: %s", dlerror());
  return reinterpret_cast<GetCreators>(function);
}

/* Whether `object`, whose file is `name`, is a TensorRT; then the plugins are registered with it, or it is said why
 * not. */
bool register_with(void* object, const char* name) {
  const auto get_registry = own_function<void* (*)()>(object, "getPluginRegistry");
  const auto get_version = own_function<int32_t (*)()>(object, "getInferLibVersion");
  if (!get_registry || !get_version) return false;

  const int32_t version = get_version(); /* 101401 is 10.14.1; TensorRT for RTX 1.7.1 says 10701 */
  if (version < 100300 || version >= 120000) {
    complain("the plugins are not registered with %s: it is version %d, and versions 100300 to 119999 are known", name,
             version);
    return true;
  }
  void* found = get_registry();
  if (!found) return true;
  static const GetCreators get_creators = open_plugins();
  if (!get_creators) return true;

  const Registry registry(found, version < 110000 ? kSlots10 : kSlots11);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = get_creators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    const char *plugin = creator->getPluginName(), *name_space = creator->getPluginNamespace();
    if (registry.has(plugin, creator->getPluginVersion(), name_space)) continue; /* loadLibrary was here before */
    if (!registry.add(creator, name_space)) complain("%s does not take %s", name, plugin);
  }
  return true;
}

/* Every TensorRT that is loaded, the lean and the dispatch runtime too, has a registry of its own.  A program may have
 * opened them with RTLD_LOCAL, where dlsym(RTLD_DEFAULT) does not see them. */
__attribute__((constructor)) void register_with_all() {
  void* program = dlopen(nullptr, RTLD_LAZY);
  link_map* map = nullptr;
  if (!program || dlinfo(program, RTLD_DI_LINKMAP, &map) != 0) return;
  for (; map; map = map->l_next) {
    void* object = dlopen(*map->l_name ? map->l_name : nullptr, RTLD_LAZY | RTLD_NOLOAD);
    if (!object) continue; /* the kernel's */
    /* A TensorRT stays open: were it unloaded and loaded again, nothing would register with it again. */
    if (!register_with(object, map->l_name)) dlclose(object);
  }
  dlclose(program);
}

}  // namespace
