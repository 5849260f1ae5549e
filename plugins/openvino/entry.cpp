/* liblitedetr_openvino, what an OpenVINO program loads: checks that its OpenVINO is the one that the ops were compiled
 * for, and loads them, liblitedetr_openvino_ops, from its own folder.
 *
 * OpenVINO's extension interface is C++, whose classes change from release to release, so the ops are linked to one
 * release by its library's name.  Any other would end in the loader's "libopenvino.so.2641: cannot open shared object
 * file", or in a second OpenVINO in the process.  This library links to none and includes no header of it.
 */
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace {

constexpr char kBuiltFor[] = LITEDETR_OPENVINO_VERSION;
constexpr char kOps[] = "liblitedetr_openvino_ops.so";

/* ov::Version and ov::get_openvino_version, as all releases since 2022 have them. */
struct Version {
  const char* build_number; /* "2026.4.1-22982-..." */
  const char* description;
};
using GetVersion = Version();

std::string folder_of(const void* address) {
  Dl_info info;
  const std::string path = dladdr(address, &info) && info.dli_fname ? info.dli_fname : "";
  return path.substr(0, path.rfind('/') + 1);
}

/* The version of the OpenVINO that has the code at `address`; empty where it has none.  A process may hold more than
 * one, and Python keeps their symbols from one another. */
std::string version_of(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fname) return "";
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return "";
  void* function = dlsym(library, "get_openvino_version");
  const std::string version = function ? reinterpret_cast<GetVersion*>(function)().build_number : "";
  dlclose(library);
  return version.substr(0, version.find('-'));
}

}  // namespace

/* What OpenVINO calls when a Core or a front end is given this library.  `extensions` is a
 * std::vector<ov::Extension::Ptr>&, which only passes through. */
extern "C" __attribute__((visibility("default"))) void create_extensions(void* extensions) {
  const std::string version = version_of(__builtin_return_address(0));
  if (version != kBuiltFor) {
    throw std::runtime_error(
        std::string("the litedetr ops were compiled for OpenVINO ") + kBuiltFor + " and this is OpenVINO " +
        (version.empty() ? "of an unknown version" : version) + ": install openvino==" + kBuiltFor +
        ", or install litedetr-deploy again where this OpenVINO is installed (docs/onnxruntime.md says how)");
  }
  const std::string path = folder_of(reinterpret_cast<const void*>(&create_extensions)) + kOps;
  /* Never closed: a model that was read with the ops may outlive every Core. */
  void* ops = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* create = ops ? dlsym(ops, "litedetr_create_extensions") : nullptr;
  if (!create) {
    const char* error = dlerror();
    throw std::runtime_error("the litedetr ops cannot be loaded: " + (error ? std::string(error) : path) +
                             "; install litedetr-deploy again");
  }
  reinterpret_cast<void (*)(void*)>(create)(extensions);
}
