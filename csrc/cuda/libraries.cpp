#include "cuda/libraries.h"

#ifndef _WIN32
#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif
#endif

#include <cstdio>
#include <utility>

namespace lowrank {
namespace cuda {
namespace {

struct Sonames {
  int major;
  const char* names[kLibraries];  // in the order of Library
};

// The DT_SONAME entries of NVIDIA's own libraries: cuSOLVER counts one behind CUDA.
constexpr Sonames kSonames[] = {
    {13, {"libcudart.so.13", "libcublas.so.13", "libcusolver.so.12"}},
    {12, {"libcudart.so.12", "libcublas.so.12", "libcusolver.so.11"}},
};

const Sonames* sonames_of(int major) {
  for (const Sonames& sonames : kSonames) {
    if (sonames.major == major) return &sonames;
  }
  return nullptr;
}

#ifdef _WIN32

OpenedLibrary open_library(const char* soname, const std::vector<std::string>&, bool, bool) {
  OpenedLibrary opened;
  opened.soname = soname;
  opened.error = std::string(soname) + " was not opened: the cuSOLVER/cuBLAS backend knows dlopen only (Linux)";
  return opened;
}
bool is_loaded(const char*) { return false; }
void* find_symbol(void*, const char*) { return nullptr; }

#else

#ifdef RTLD_NOLOAD
constexpr int kNoLoad = RTLD_NOLOAD;
#else
constexpr int kNoLoad = 0;
#endif

std::string path_of(void* handle, const std::string& otherwise) {
#ifdef __linux__
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr && map->l_name != nullptr) return map->l_name;
#endif
  return otherwise;
}

std::string last_error() {
  const char* text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

bool file_exists(const std::string& path) {
  if (FILE* file = std::fopen(path.c_str(), "rb")) {
    std::fclose(file);
    return true;
  }
  return false;
}

void* open_loaded(const char* soname) {
  return kNoLoad == 0 ? nullptr : dlopen(soname, RTLD_NOW | RTLD_LOCAL | kNoLoad);
}

bool is_loaded(const char* soname) {
  void* handle = open_loaded(soname);
  if (handle != nullptr) dlclose(handle);  // gives the reference back; the library stays
  return handle != nullptr;
}

// The handle is kept for the life of the process: unloading CUDA libraries is not safe.
OpenedLibrary open_library(const char* soname, const std::vector<std::string>& folders, bool use_loaded,
                           bool use_system) {
  OpenedLibrary opened;
  opened.soname = soname;
  std::string tried = use_loaded ? "not loaded by torch" : "";
  auto note = [&tried](const std::string& text) { tried += (tried.empty() ? "" : "; ") + text; };
  if (use_loaded && (opened.handle = open_loaded(soname)) != nullptr) opened.origin = "already loaded";
  for (const std::string& folder : folders) {
    if (opened.handle != nullptr) break;
    const std::string path = folder + "/" + soname;
    if (!file_exists(path)) continue;
    if ((opened.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) != nullptr) {
      opened.origin = "folder";
    } else {
      note(last_error());
    }
  }
  if (opened.handle == nullptr) {
    note("not in any of " + std::to_string(folders.size()) + " folders searched");
    if (use_system) {
      if ((opened.handle = dlopen(soname, RTLD_NOW | RTLD_LOCAL)) != nullptr) {
        opened.origin = "system";
      } else {
        note("system loader: " + last_error());
      }
    }
  }
  if (opened.handle != nullptr) {
    opened.path = path_of(opened.handle, soname);
  } else {
    opened.error = std::string(soname) + " was not found (" + tried + ")";
  }
  return opened;
}

void* find_symbol(void* handle, const char* name) { return handle == nullptr ? nullptr : dlsym(handle, name); }

#endif

template <class Function>
void resolve(Symbol<Function>& symbol, void* handle, std::vector<std::string>& missing) {
  void* address = find_symbol(handle, symbol.name());
  if (address == nullptr) {
    missing.push_back(symbol.name());
  } else {
    symbol.set(address);
  }
}

std::string name_in(const std::vector<std::pair<int, const char*>>& names, int status, const char* prefix) {
  for (const auto& entry : names) {
    if (entry.first == status) return std::string(prefix) + entry.second;
  }
  return std::string(prefix) + "(unnamed)";
}

}  // namespace

std::string cuda_error_name(int error) {
  return name_in({{2, "MemoryAllocation"},
                  {3, "InitializationError"},
                  {35, "InsufficientDriver"},
                  {100, "NoDevice"},
                  {101, "InvalidDevice"}},
                 error, "cudaError");
}

std::string cublas_status_name(int status) {
  return name_in({{1, "NOT_INITIALIZED"},
                  {3, "ALLOC_FAILED"},
                  {7, "INVALID_VALUE"},
                  {8, "ARCH_MISMATCH"},
                  {11, "MAPPING_ERROR"},
                  {13, "EXECUTION_FAILED"},
                  {14, "INTERNAL_ERROR"},
                  {15, "NOT_SUPPORTED"},
                  {16, "LICENSE_ERROR"}},
                 status, "CUBLAS_STATUS_");
}

std::string cusolver_status_name(int status) {
  return name_in({{1, "NOT_INITIALIZED"},
                  {2, "ALLOC_FAILED"},
                  {3, "INVALID_VALUE"},
                  {4, "ARCH_MISMATCH"},
                  {5, "MAPPING_ERROR"},
                  {6, "EXECUTION_FAILED"},
                  {7, "INTERNAL_ERROR"},
                  {8, "MATRIX_TYPE_NOT_SUPPORTED"},
                  {9, "NOT_SUPPORTED"},
                  {10, "ZERO_PIVOT"},
                  {11, "INVALID_LICENSE"},
                  {31, "INVALID_WORKSPACE"}},
                 status, "CUSOLVER_STATUS_");
}

Libraries::Libraries(std::vector<int> majors, std::vector<std::string> folders, bool use_loaded, bool use_system) {
  // What torch has loaded decides the version: two CUDA versions in one process would not share streams and memory.
  std::vector<int> order;
  for (int loaded = use_loaded ? 1 : 0; loaded >= 0; --loaded) {
    for (int major : majors) {
      const Sonames* sonames = sonames_of(major);
      if (sonames == nullptr) throw CudaLibraryError("no known sonames for CUDA " + std::to_string(major));
      if (loaded == 0 || is_loaded(sonames->names[kCublas]) || is_loaded(sonames->names[kCudart])) {
        order.push_back(major);
      }
    }
  }
  std::string failures;
  for (int major : order) {
    const Sonames* sonames = sonames_of(major);
    OpenedLibrary opened[kLibraries];
    bool any = false;
    std::vector<std::string> places = folders;
    for (int which = 0; which < kLibraries; ++which) {
      opened[which] = open_library(sonames->names[which], places, use_loaded, use_system);
      if (opened[which].handle == nullptr) continue;
      any = true;
      // The libraries of one CUDA mostly lie together; torch opens cuSOLVER late, so it may not be loaded yet.
      const std::string::size_type slash = opened[which].path.rfind('/');
      if (slash != std::string::npos) places.push_back(opened[which].path.substr(0, slash));
    }
    for (int which = 0; which < kLibraries; ++which) {
      // With nothing found, the message names what was tried for every version, first choice first.
      const std::string earlier = opened_[which].error;
      opened_[which] = opened[which];
      if (!any && !earlier.empty()) opened_[which].error = earlier + ", " + opened[which].error;
    }
    major_ = any ? major : 0;
    if (any) break;
  }
#define LOWRANK_SYMBOL(library, name, status, arguments) resolve(name, opened_[library].handle, missing_);
#include "cuda/symbols.h"
#undef LOWRANK_SYMBOL
}

std::vector<std::string> Libraries::missing_symbols() const { return missing_; }

std::vector<std::string> Libraries::symbol_names() const {
  return {
#define LOWRANK_SYMBOL(library, name, status, arguments) #name,
#include "cuda/symbols.h"
#undef LOWRANK_SYMBOL
  };
}

}  // namespace cuda
}  // namespace lowrank
